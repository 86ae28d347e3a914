#include "xla_support.h"

#include "absl/strings/str_cat.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"

namespace accumops {

TensorShape InputTensorShape(XlaOpKernelContext* ctx, int input) {
  TensorShape shape;
  const auto xla_shape = ctx->InputXlaShape(input);
  if (xla_shape.ok()) {
    for (const std::int64_t size : xla_shape->dimensions()) shape.AddDim(size);
  } else {
    ctx->SetStatus(xla_shape.status());
  }
  return shape;
}

absl::Status RequireScalarInput(XlaOpKernelContext* ctx, int input, const char* name) {
  const TensorShape shape = InputTensorShape(ctx, input);
  if (shape.dims() == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " must be a scalar, not be of shape ", shape.DebugString(), "."));
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
