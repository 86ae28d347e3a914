// AccumOps>ClipUnits lowered to XLA, for functions with jit_compile=True.
#include "absl/strings/str_cat.h"
#include "clip_attributes.h"
#include "input_checks.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla_support.h"

namespace accumops {
namespace {

class ClipUnitsXlaOp : public XlaOpKernel {
 public:
  explicit ClipUnitsXlaOp(OpKernelConstruction* construction) : XlaOpKernel(construction) {
    OP_REQUIRES_OK(construction, attributes_.Read(*construction));
  }

  void Compile(XlaOpKernelContext* ctx) override {
    for (int i = 0; i < attributes_.count; ++i) {
      const TensorShape shape = InputTensorShape(ctx, i, absl::StrCat("gradients[", i, "]"));
      const TensorShape weights =
          InputTensorShape(ctx, attributes_.count + i, absl::StrCat("weights[", i, "]"));
      std::int64_t rows = 0, units = 0;
      OP_REQUIRES_OK(ctx, CheckClipped(i, shape, weights, &rows, &units));
      const xla::XlaOp matrix = Wide(ctx->Input(i), rows, units);
      const xla::XlaOp factors =
          Factors(matrix, Wide(ctx->Input(attributes_.count + i), rows, units), units);
      const xla::XlaOp clipped = xla::Mul(matrix, factors, {1});
      ctx->SetOutput(i,
                     xla::Reshape(xla::ConvertElementType(clipped, xla::F32), shape.dim_sizes()));
    }
  }

 private:
  static xla::XlaOp Wide(xla::XlaOp values, std::int64_t rows, std::int64_t units) {
    return xla::ConvertElementType(xla::Reshape(values, {rows, units}), xla::F64);
  }

  xla::XlaOp Factors(xla::XlaOp gradient, xla::XlaOp weights, std::int64_t units) const {
    xla::XlaBuilder* builder = gradient.builder();
    const auto constant = [&](double value) {
      return xla::Broadcast(xla::ConstantR0<double>(builder, value), {units});
    };
    const auto squares = [&](xla::XlaOp x) {
      return xla::Reduce(x * x, xla::Zero(builder, xla::F64), Sum(xla::F64), {0});
    };
    const xla::XlaOp gradients = squares(gradient), of_weights = squares(weights);
    const xla::XlaOp norm = xla::Max(xla::Sqrt(of_weights), constant(attributes_.settings.epsilon));
    const xla::XlaOp limit = constant(attributes_.settings.clip_factor) * norm;
    const xla::XlaOp size = xla::Sqrt(gradients);
    const xla::XlaOp clips = xla::And(xla::IsFinite(gradients + of_weights), xla::Gt(size, limit));
    return xla::Select(clips, limit / size, constant(1));
  }

  ClipAttributes attributes_;
};

// Straight to the compilation devices, as accumulate_xla.cc explains.
REGISTER_KERNEL_BUILDER(Name("AccumOps>ClipUnits").Device(tensorflow::DEVICE_CPU_XLA_JIT),
                        ClipUnitsXlaOp);
REGISTER_KERNEL_BUILDER(Name("AccumOps>ClipUnits").Device(tensorflow::DEVICE_GPU_XLA_JIT),
                        ClipUnitsXlaOp);

}  // namespace
}  // namespace accumops
