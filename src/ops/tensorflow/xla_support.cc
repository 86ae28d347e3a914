#include "xla_support.h"

#include "input_checks.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"

namespace accumops {
namespace {

TensorShape ToTensorShape(XlaOpKernelContext* ctx, const absl::StatusOr<xla::Shape>& input) {
  TensorShape shape;
  if (input.ok()) {
    for (const std::int64_t size : input->dimensions()) shape.AddDim(size);
  } else {
    ctx->SetStatus(input.status());
  }
  return shape;
}

}  // namespace

TensorShape InputTensorShape(XlaOpKernelContext* ctx, int input) {
  return ToTensorShape(ctx, ctx->InputXlaShape(input));
}

TensorShape InputTensorShape(XlaOpKernelContext* ctx, const char* name) {
  return ToTensorShape(ctx, ctx->InputXlaShape(name));
}

absl::Status RequireScalar(XlaOpKernelContext* ctx, const char* name) {
  return CheckScalar(name, InputTensorShape(ctx, name));
}

xla::XlaComputation Sum(xla::PrimitiveType type) {
  xla::XlaBuilder builder("sum");
  const xla::Shape scalar = xla::ShapeUtil::MakeShape(type, {});
  xla::Add(xla::Parameter(&builder, 0, scalar, "a"), xla::Parameter(&builder, 1, scalar, "b"));
  return builder.Build().value();
}

xla::XlaOp SquaredNorm(xla::XlaOp values) {
  const xla::XlaOp wide = xla::ConvertElementType(values, xla::F64);
  const xla::XlaOp zero = xla::Zero(values.builder(), xla::F64);
  return xla::Reshape(xla::ReduceAll(xla::Mul(wide, wide), zero, Sum(xla::F64)), {1});
}

}  // namespace accumops
