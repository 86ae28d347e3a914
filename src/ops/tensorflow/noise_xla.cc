// AccumOps>AddNoiseGroup and AccumOps>EndNoiseWindow lowered to XLA, for functions with
// jit_compile=True.
#include <initializer_list>
#include <limits>

#include "input_checks.h"
#include "noise.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla_support.h"
#include "xla_variable_list.h"

namespace accumops {
namespace {

using xla::XlaOp;

// Value `i` of a vector.
XlaOp At(XlaOp vector, std::int64_t i) {
  return xla::Reshape(xla::Slice(vector, {i}, {i + 1}, {1}), {});
}

XlaOp ToVector(xla::XlaBuilder* builder, std::initializer_list<XlaOp> scalars) {
  std::vector<XlaOp> parts;
  for (const XlaOp& scalar : scalars) parts.push_back(xla::Reshape(scalar, {1}));
  return xla::ConcatInDim(builder, parts, 0);
}

XlaOp DivideNoNan(XlaOp a, XlaOp b) {
  const XlaOp zero = xla::ZerosLike(b);
  return xla::Select(xla::Eq(b, zero), zero, a / b);
}

class AddNoiseGroupXlaOp : public XlaOpKernel {
 public:
  using XlaOpKernel::XlaOpKernel;

  void Compile(XlaOpKernelContext* ctx) override {
    XlaVariableList variables(ctx);
    OP_REQUIRES_OK(ctx, variables.Add({"window"}));
    OP_REQUIRES_OK(ctx,
                   CheckNoiseGroup(variables, variables.size(), InputTensorShape(ctx, "norms")));
    for (const char* name : {"share", "starts"}) OP_REQUIRES_OK(ctx, RequireScalar(ctx, name));
    xla::XlaBuilder* builder = ctx->builder();
    const XlaOp zero = xla::Zero(builder, xla::F64), one = xla::One(builder, xla::F64);
    const XlaOp norms = xla::Reduce(ctx->Input("norms"), zero, Sum(xla::F64), {1});
    const XlaOp share = xla::ConvertElementType(ctx->Input("share"), xla::F64);
    const XlaOp starts = ctx->Input("starts"), none = xla::Eq(share, zero);
    XlaOp window;
    OP_REQUIRES_OK(ctx, variables.Read(0, &window));
    const auto held = [&](int i) { return xla::Select(starts, zero, At(window, i)); };
    OP_REQUIRES_OK(
        ctx, variables.Assign(
                 0, ToVector(builder, {held(NoiseWindow::kSquares) +
                                           xla::Select(none, zero, At(norms, 0) * share),
                                       held(NoiseWindow::kCount) + xla::Select(none, zero, one),
                                       At(norms, 1), At(window, NoiseWindow::kShares) + share})));
  }
};

class EndNoiseWindowXlaOp : public XlaOpKernel {
 public:
  using XlaOpKernel::XlaOpKernel;

  void Compile(XlaOpKernelContext* ctx) override {
    XlaVariableList variables(ctx);
    OP_REQUIRES_OK(ctx, variables.Add({"statistics"}));
    OP_REQUIRES_OK(ctx,
                   CheckNoiseEnd(variables, variables.size(), InputTensorShape(ctx, "window")));
    for (const char* name : {"shares", "scale", "applies", "steps", "decay"}) {
      OP_REQUIRES_OK(ctx, RequireScalar(ctx, name));
    }
    xla::XlaBuilder* builder = ctx->builder();
    const XlaOp window = ctx->Input("window"), scale = ctx->Input("scale");
    const XlaOp shares = xla::ConvertElementType(ctx->Input("shares"), xla::F64);
    const XlaOp zero = xla::Zero(builder, xla::F64), one = xla::One(builder, xla::F64);
    const XlaOp unscaled = one / (scale * scale), count = At(window, NoiseWindow::kCount);
    const XlaOp mean = unscaled * DivideNoNan(At(window, NoiseWindow::kSums), shares * shares);
    const XlaOp trace =
        DivideNoNan(unscaled * At(window, NoiseWindow::kSquares) - shares * mean, count - one);
    const XlaOp makes_update = xla::And(ctx->Input("applies"), xla::IsFinite(mean));
    const XlaOp tells = xla::And(xla::And(makes_update, xla::IsFinite(trace)), xla::Gt(count, one));
    const XlaOp found = ToVector(builder, {trace, mean - DivideNoNan(trace, shares), one});
    const XlaOp decay = ctx->Input("decay");
    XlaOp averages, ended;
    OP_REQUIRES_OK(ctx, variables.Read(0, &averages));
    OP_REQUIRES_OK(ctx, variables.Read(2, &ended));
    const XlaOp moved = decay * averages + (one - decay) * found;
    const XlaOp all_tell = xla::Broadcast(tells, {NoiseStatistics::kAverages});
    OP_REQUIRES_OK(ctx, variables.Assign(0, xla::Select(all_tell, moved, averages)));
    const XlaOp nan = xla::ConstantR0(builder, std::numeric_limits<double>::quiet_NaN());
    OP_REQUIRES_OK(ctx, variables.Assign(1, xla::Select(makes_update, xla::Sqrt(mean), nan)));
    const XlaOp more = ToVector(builder, {xla::One(builder, xla::S64), ctx->Input("steps")});
    OP_REQUIRES_OK(ctx, variables.Assign(2, ended + more));
  }
};

// Straight to the compilation devices, as accumulate_xla.cc explains.
REGISTER_KERNEL_BUILDER(Name("AccumOps>AddNoiseGroup").Device(tensorflow::DEVICE_CPU_XLA_JIT),
                        AddNoiseGroupXlaOp);
REGISTER_KERNEL_BUILDER(Name("AccumOps>AddNoiseGroup").Device(tensorflow::DEVICE_GPU_XLA_JIT),
                        AddNoiseGroupXlaOp);
REGISTER_KERNEL_BUILDER(Name("AccumOps>EndNoiseWindow").Device(tensorflow::DEVICE_CPU_XLA_JIT),
                        EndNoiseWindowXlaOp);
REGISTER_KERNEL_BUILDER(Name("AccumOps>EndNoiseWindow").Device(tensorflow::DEVICE_GPU_XLA_JIT),
                        EndNoiseWindowXlaOp);

}  // namespace
}  // namespace accumops
