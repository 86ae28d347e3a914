// AccumOps>AddNoiseGroup and AccumOps>EndNoiseWindow on the CPU and, where the library has CUDA
// kernels, on GPUs: they check the inputs and call a launcher.
#include "input_checks.h"
#include "kernel_support.h"
#include "noise.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "variable_list.h"

namespace accumops {
namespace {

// The inputs that lie beside the variables.
struct Group {
  const Tensor *norms, *share, *starts;

  std::size_t count() const { return static_cast<std::size_t>(norms->dim_size(1)); }
};
struct End {
  const Tensor *window, *shares, *scale, *applies;

  const double* values() const { return window->vec<double>().data(); }
};

// The launchers of a device.
struct Cpu {
  static absl::Status Add(OpKernelContext*, const Group& group, double* window) {
    AddNoiseGroupCpu(group.norms->flat<double>().data(), group.count(), NumberOf(*group.share),
                     group.starts->scalar<bool>()(), window);
    return absl::OkStatus();
  }
  static absl::Status Finish(OpKernelContext*, const End& end, NoiseEnding ending,
                             const NoiseStatistics& statistics) {
    ending.shares = NumberOf(*end.shares);
    ending.scale = NumberOf(*end.scale);
    ending.applies = end.applies->scalar<bool>()();
    EndNoiseWindowCpu(end.values(), ending, statistics);
    return absl::OkStatus();
  }
  static constexpr CopyBytes kCopy = CopyOnHost;
};

#if defined(ACCUMOPS_CUDA)
struct Gpu {
  static DeviceScalar ToScalar(const Tensor& scalar) {
    return {scalar.data(), ToDType(scalar.dtype())};
  }
  static absl::Status Add(OpKernelContext* ctx, const Group& group, double* window) {
    return FromCuda(AddNoiseGroupCuda(group.norms->flat<double>().data(), group.count(),
                                      ToScalar(*group.share), group.starts->scalar<bool>().data(),
                                      window, CudaStream(ctx)));
  }
  static absl::Status Finish(OpKernelContext* ctx, const End& end, const NoiseEnding& ending,
                             const NoiseStatistics& statistics) {
    return FromCuda(EndNoiseWindowCuda(
        end.values(), ending, ToScalar(*end.shares), end.scale->scalar<double>().data(),
        end.applies->scalar<bool>().data(), statistics, CudaStream(ctx)));
  }
  static constexpr CopyBytes kCopy = CopyOnDevice;
};
#endif

template <typename Launchers>
class AddNoiseGroupOp : public ParallelKernel {
 public:
  using ParallelKernel::ParallelKernel;

  void Compute(OpKernelContext* ctx) final {
    Group group;
    OP_REQUIRES_OK(ctx, ctx->input("norms", &group.norms));
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "share", &group.share));
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "starts", &group.starts));
    VariableList variables;
    OP_REQUIRES_OK(ctx, variables.Add(ctx, "window"));
    OP_REQUIRES_OK(ctx, variables.Lock());
    OP_REQUIRES_OK(ctx, CheckNoiseGroup(variables, variables.size(), group.norms->shape()));
    OP_REQUIRES_OK(ctx, variables.MakeWritable(ctx, Launchers::kCopy, variables.size()));
    OP_REQUIRES_OK(ctx,
                   Launchers::Add(ctx, group, static_cast<double*>(variables.tensor(0).data())));
  }
};

template <typename Launchers>
class EndNoiseWindowOp : public ParallelKernel {
 public:
  using ParallelKernel::ParallelKernel;

  void Compute(OpKernelContext* ctx) final {
    End end;
    const Tensor *steps, *decay;
    OP_REQUIRES_OK(ctx, ctx->input("window", &end.window));
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "shares", &end.shares));
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "scale", &end.scale));
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "applies", &end.applies));
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "steps", &steps));
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "decay", &decay));
    VariableList variables;
    OP_REQUIRES_OK(ctx, variables.Add(ctx, "statistics"));
    OP_REQUIRES_OK(ctx, variables.Lock());
    OP_REQUIRES_OK(ctx, CheckNoiseEnd(variables, variables.size(), end.window->shape()));
    OP_REQUIRES_OK(ctx, variables.MakeWritable(ctx, Launchers::kCopy, variables.size()));
    NoiseEnding ending = {};
    ending.steps = steps->scalar<std::int64_t>()();
    ending.decay = decay->scalar<double>()();
    OP_REQUIRES_OK(ctx,
                   Launchers::Finish(ctx, end, ending,
                                     {static_cast<double*>(variables.tensor(0).data()),
                                      static_cast<double*>(variables.tensor(1).data()),
                                      static_cast<std::int64_t*>(variables.tensor(2).data())}));
  }
};

REGISTER_KERNEL_BUILDER(Name("AccumOps>AddNoiseGroup").Device(tensorflow::DEVICE_CPU),
                        AddNoiseGroupOp<Cpu>);
REGISTER_KERNEL_BUILDER(Name("AccumOps>EndNoiseWindow").Device(tensorflow::DEVICE_CPU),
                        EndNoiseWindowOp<Cpu>);
#if defined(ACCUMOPS_CUDA)
REGISTER_KERNEL_BUILDER(Name("AccumOps>AddNoiseGroup").Device(tensorflow::DEVICE_GPU),
                        AddNoiseGroupOp<Gpu>);
REGISTER_KERNEL_BUILDER(Name("AccumOps>EndNoiseWindow")
                            .Device(tensorflow::DEVICE_GPU)
                            .HostMemory("steps")
                            .HostMemory("decay"),
                        EndNoiseWindowOp<Gpu>);
#endif

}  // namespace
}  // namespace accumops
