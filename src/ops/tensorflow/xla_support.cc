#include "xla_support.h"

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

xla::XlaComputation Sum(xla::PrimitiveType type) {
  xla::XlaBuilder builder("sum");
  const xla::Shape scalar = xla::ShapeUtil::MakeShape(type, {});
  xla::Add(xla::Parameter(&builder, 0, scalar, "a"), xla::Parameter(&builder, 1, scalar, "b"));
  return builder.Build().value();
}

}  // namespace accumops
