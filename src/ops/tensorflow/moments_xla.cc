// AccumOps>MergeMoments lowered to XLA, for functions with jit_compile=True.
#include <vector>

#include "absl/strings/str_cat.h"
#include "input_checks.h"
#include "moments.h"
#include "moments_attributes.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla_support.h"
#include "xla_variable_list.h"

namespace accumops {
namespace {

xla::XlaOp Wide(xla::XlaOp x) { return xla::ConvertElementType(x, xla::F64); }

class MergeMomentsXlaOp : public XlaOpKernel {
 public:
  explicit MergeMomentsXlaOp(OpKernelConstruction* construction) : XlaOpKernel(construction) {
    OP_REQUIRES_OK(construction, attributes_.Read(*construction));
  }

  void Compile(XlaOpKernelContext* ctx) override {
    XlaVariableList variables(ctx);
    OP_REQUIRES_OK(ctx, variables.Add({"window", "moving"}));
    const int count = attributes_.window + attributes_.moving;  // its input
    const int moments = count + attributes_.batches;
    std::vector<TensorShape> shapes;
    for (int i = 0; i < 3 * attributes_.batches; ++i) {
      shapes.push_back(InputTensorShape(ctx, moments + i, absl::StrCat("moments[", i, "]")));
    }
    std::int64_t channels = 0;
    OP_REQUIRES_OK(ctx, CheckMoments(variables, attributes_, shapes, &channels));
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "momentum"));
    if (attributes_.batches != 0) OP_REQUIRES_OK(ctx, RequireScalar(ctx, "count"));
    xla::XlaBuilder* builder = ctx->builder();
    const auto row = [&](xla::XlaOp values, std::int64_t i) {
      return xla::Reshape(xla::Slice(values, {i, 0}, {i + 1, channels}, {1, 1}), {channels});
    };
    const auto value = [&](xla::XlaOp counters, std::int64_t i) {
      return xla::Reshape(xla::Slice(counters, {i}, {i + 1}, {1}), {});
    };

    const xla::XlaOp none = xla::Zero(builder, xla::S64);
    xla::XlaOp before = none, calls = none, limit = none;
    xla::XlaOp mean = xla::Broadcast(xla::Zero(builder, xla::F64), {channels});
    xla::XlaOp centred = mean;
    if (attributes_.window != 0) {
      xla::XlaOp counters, values;
      OP_REQUIRES_OK(ctx, variables.Read(0, &counters));
      OP_REQUIRES_OK(ctx, variables.Read(1, &values));
      before = value(counters, MomentsWindow::kValues);
      calls = value(counters, MomentsWindow::kCalls) + xla::One(builder, xla::S64);
      limit = value(counters, MomentsWindow::kLimit);
      const xla::XlaOp empty = xla::Broadcast(xla::Eq(before, none), {channels});
      const xla::XlaOp zeros = mean;
      mean = xla::Select(empty, zeros, row(values, 0));
      centred = xla::Select(empty, zeros, row(values, 1));
    }
    xla::XlaOp total = before;
    if (attributes_.batches != 0) {
      const xla::XlaOp added = ctx->Input(count);
      total = before + added;
      const xla::XlaOp zero = xla::Zero(builder, xla::F64);
      const xla::XlaOp share = xla::Select(xla::Gt(total, none), Wide(added) / Wide(total), zero);
      const xla::XlaOp delta = Wide(ctx->Input(moments)) + Wide(ctx->Input(moments + 1)) - mean;
      // A batch without values has no moments: what stands for them may be NaN.
      const xla::XlaOp some = xla::Broadcast(xla::Gt(added, none), {channels});
      centred = xla::Select(some,
                            centred + Wide(ctx->Input(moments + 2)) * Wide(added) +
                                delta * delta * (Wide(before) * share),
                            centred);
      mean = xla::Select(some, mean + delta * share, mean);
    }

    xla::XlaOp ends = xla::ConstantR0<bool>(builder, attributes_.moving != 0);
    if (attributes_.moving != 0 && attributes_.window != 0 && attributes_.batches != 0)
      ends = xla::Ge(calls, limit);
    if (attributes_.moving != 0) {
      const xla::XlaOp moves = xla::Broadcast(xla::And(ends, xla::Gt(total, none)), {channels});
      const xla::XlaOp size = xla::Max(Wide(total), xla::One(builder, xla::F64));
      const xla::XlaOp targets[2] = {mean, centred / size};
      xla::XlaOp moved[2];
      const auto moving = static_cast<std::size_t>(attributes_.window);
      const bool wide = variables.dtype(moving) == tensorflow::DT_DOUBLE;
      for (std::size_t i = 0; i < 2; ++i) {
        xla::XlaOp old;
        OP_REQUIRES_OK(ctx, variables.Read(moving + i, &old));
        const auto like = [&](xla::XlaOp x) {
          return xla::ConvertElementType(x, wide ? xla::F64 : xla::F32);
        };
        const xla::XlaOp momentum = ctx->Input("momentum");
        const xla::XlaOp rest = xla::One(builder, xla::F64) - momentum;
        moved[i] = xla::Select(moves, old * like(momentum) + like(targets[i]) * like(rest), old);
      }
      for (std::size_t i = 0; i < 2; ++i) {
        OP_REQUIRES_OK(ctx, variables.Assign(moving + i, moved[i]));
      }
    }
    if (attributes_.window != 0) {
      const auto vector = [](xla::XlaOp x) { return xla::Reshape(x, {1}); };
      const xla::XlaOp counters =
          xla::ConcatInDim(builder,
                           {vector(xla::Select(ends, none, total)),
                            vector(xla::Select(ends, none, calls)), vector(limit)},
                           0);
      const xla::XlaOp values = xla::ConcatInDim(
          builder, {xla::Reshape(mean, {1, channels}), xla::Reshape(centred, {1, channels})}, 0);
      OP_REQUIRES_OK(ctx, variables.Assign(0, counters));
      OP_REQUIRES_OK(ctx, variables.Assign(1, values));
    }
  }

 private:
  MomentsAttributes attributes_;
};

// Straight to the compilation devices, as accumulate_xla.cc explains.
REGISTER_KERNEL_BUILDER(Name("AccumOps>MergeMoments").Device(tensorflow::DEVICE_CPU_XLA_JIT),
                        MergeMomentsXlaOp);
REGISTER_KERNEL_BUILDER(Name("AccumOps>MergeMoments").Device(tensorflow::DEVICE_GPU_XLA_JIT),
                        MergeMomentsXlaOp);

}  // namespace
}  // namespace accumops
