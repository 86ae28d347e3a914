#include "xla_support.h"

#include "absl/strings/str_cat.h"
#include "input_checks.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"

namespace accumops {
namespace {

TensorShape ToTensorShape(XlaOpKernelContext* ctx, const absl::StatusOr<xla::Shape>& input,
                          const std::string& name, Dimensions known) {
  TensorShape shape;
  if (!input.ok()) {
    ctx->SetStatus(input.status());
    return shape;
  }
  for (int i = 0; i < static_cast<int>(input->dimensions().size()); ++i) {
    if (i >= known.first && i < known.end && input->is_dynamic_dimension(i)) {
      ctx->SetStatus(absl::InvalidArgumentError(
          absl::StrCat(name, " is ", input->ToString(), ": XLA must know the size of dimension ", i,
                       " before the function runs.")));
    }
    shape.AddDim(input->dimensions(i));
  }
  return shape;
}

}  // namespace

TensorShape InputTensorShape(XlaOpKernelContext* ctx, int input, const std::string& name,
                             Dimensions known) {
  return ToTensorShape(ctx, ctx->InputXlaShape(input), name, known);
}

TensorShape InputTensorShape(XlaOpKernelContext* ctx, const char* name, Dimensions known) {
  return ToTensorShape(ctx, ctx->InputXlaShape(name), name, known);
}

absl::Status RequireScalar(XlaOpKernelContext* ctx, const char* name) {
  return CheckScalar(name, InputTensorShape(ctx, name));
}

absl::Status ReadOptionalFlag(XlaOpKernelContext* ctx, const char* name, xla::XlaOp* flag) {
  int start = 0, stop = 0;
  TF_RETURN_IF_ERROR(ctx->op_kernel().InputRange(name, &start, &stop));
  if (start == stop) {
    *flag = xla::ConstantR0<bool>(ctx->builder(), true);
    return absl::OkStatus();
  }
  if (stop - start > 1 || InputTensorShape(ctx, start, name).dims() != 0) return NotOneFlag(name);
  *flag = ctx->Input(start);
  return absl::OkStatus();
}

xla::XlaComputation Sum(xla::PrimitiveType type) {
  xla::XlaBuilder builder("sum");
  const xla::Shape scalar = xla::ShapeUtil::MakeShape(type, {});
  xla::Add(xla::Parameter(&builder, 0, scalar, "a"), xla::Parameter(&builder, 1, scalar, "b"));
  return builder.Build().value();
}

xla::XlaOp AllFinite(xla::XlaOp values) {
  xla::XlaBuilder builder("all");
  const xla::Shape scalar = xla::ShapeUtil::MakeShape(xla::PRED, {});
  xla::And(xla::Parameter(&builder, 0, scalar, "a"), xla::Parameter(&builder, 1, scalar, "b"));
  const xla::XlaOp yes = xla::ConstantR0<bool>(values.builder(), true);
  return xla::ReduceAll(xla::IsFinite(values), yes, builder.Build().value());
}

xla::XlaOp SquaredNorm(xla::XlaOp values) {
  const xla::XlaOp wide = xla::ConvertElementType(values, xla::F64);
  const xla::XlaOp zero = xla::Zero(values.builder(), xla::F64);
  return xla::Reshape(xla::ReduceAll(xla::Mul(wide, wide), zero, Sum(xla::F64)), {1});
}

}  // namespace accumops
