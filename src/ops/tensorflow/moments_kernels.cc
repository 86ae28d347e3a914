// AccumOps>MergeMoments on the CPU and, where the library has CUDA kernels, on GPUs: checks the
// inputs, calls a launcher.
#include <vector>

#include "input_checks.h"
#include "kernel_support.h"
#include "moments.h"
#include "moments_attributes.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "variable_list.h"

namespace accumops {
namespace {

// The launchers of a device.
struct Cpu {
  static absl::Status Merge(OpKernelContext*, const MomentsMerge& args) {
    MergeMomentsCpu(args);
    return absl::OkStatus();
  }
  static constexpr CopyBytes kCopy = CopyOnHost;
};

#if defined(ACCUMOPS_CUDA)
struct Gpu {
  static absl::Status Merge(OpKernelContext* ctx, const MomentsMerge& args) {
    return FromCuda(MergeMomentsCuda(args, CudaStream(ctx)));
  }
  static constexpr CopyBytes kCopy = CopyOnDevice;
};
#endif

template <typename Launchers>
class MergeMomentsOp : public ParallelKernel {
 public:
  explicit MergeMomentsOp(OpKernelConstruction* construction) : ParallelKernel(construction) {
    OP_REQUIRES_OK(construction, attributes_.Read(*construction));
  }

  void Compute(OpKernelContext* ctx) final {
    MomentsMerge args = {};
    VariableList variables;
    OP_REQUIRES_OK(ctx, variables.Add(ctx, "window"));
    OP_REQUIRES_OK(ctx, variables.Add(ctx, "moving"));
    OP_REQUIRES_OK(ctx, variables.Lock());
    OpInputList moments;
    OP_REQUIRES_OK(ctx, ctx->input_list("moments", &moments));
    std::vector<TensorShape> shapes;
    for (const Tensor& each : moments) shapes.push_back(each.shape());
    OP_REQUIRES_OK(ctx, CheckMoments(variables, attributes_, shapes, &args.channels));
    const Tensor* momentum = nullptr;
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "momentum", &momentum));
    if (attributes_.batches != 0) {
      const Tensor* count = nullptr;  // the one item of its list
      OP_REQUIRES_OK(ctx, RequireScalar(ctx, "count", &count));
      args.batch = {count->scalar<std::int64_t>().data(), moments[0].data(), moments[1].data(),
                    moments[2].data(), ToDType(moments[0].dtype())};
    }
    OP_REQUIRES_OK(ctx, variables.MakeWritable(ctx, Launchers::kCopy, variables.size()));
    if (attributes_.window != 0) {
      auto* const values = static_cast<double*>(variables.tensor(1).data());
      args.window = {static_cast<std::int64_t*>(variables.tensor(0).data()), values,
                     values + args.channels};
    }
    const auto moving = static_cast<std::size_t>(attributes_.window);
    if (attributes_.moving != 0) {
      args.moving = {variables.tensor(moving).data(), variables.tensor(moving + 1).data(),
                     ToDType(variables.tensor(moving).dtype()), momentum->scalar<double>()()};
    }
    OP_REQUIRES_OK(ctx, Launchers::Merge(ctx, args));
  }

 private:
  MomentsAttributes attributes_;
};

REGISTER_KERNEL_BUILDER(Name("AccumOps>MergeMoments").Device(tensorflow::DEVICE_CPU),
                        MergeMomentsOp<Cpu>);
#if defined(ACCUMOPS_CUDA)
REGISTER_KERNEL_BUILDER(
    Name("AccumOps>MergeMoments").Device(tensorflow::DEVICE_GPU).HostMemory("momentum"),
    MergeMomentsOp<Gpu>);
#endif

}  // namespace
}  // namespace accumops
