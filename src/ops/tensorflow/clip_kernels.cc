// AccumOps>ClipUnits on the CPU and, where the library has CUDA kernels, on GPUs: checks the
// inputs, calls a launcher.
#include <vector>

#include "clip_attributes.h"
#include "clip_units.h"
#include "input_checks.h"
#include "kernel_support.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace accumops {
namespace {

// The launchers of a device.
struct Cpu {
  static absl::Status Clip(OpKernelContext* ctx, const std::vector<ClipItem>& items,
                           const ClipSettings& settings) {
    PoolExecutor executor(ctx);
    ClipUnitsCpu(items.data(), items.size(), settings, executor);
    return absl::OkStatus();
  }
};

#if defined(ACCUMOPS_CUDA)
struct Gpu {
  static absl::Status Clip(OpKernelContext* ctx, const std::vector<ClipItem>& items,
                           const ClipSettings& settings) {
    Tensor workspace;
    const std::size_t bytes = ClipUnitsWorkspace(items.data(), items.size());
    TF_RETURN_IF_ERROR(ctx->allocate_temp(
        tensorflow::DT_INT8, TensorShape({static_cast<std::int64_t>(bytes)}), &workspace));
    return FromCuda(
        ClipUnitsCuda(items.data(), items.size(), settings, workspace.data(), CudaStream(ctx)));
  }
};
#endif

template <typename Launchers>
class ClipUnitsOp : public ParallelKernel {
 public:
  explicit ClipUnitsOp(OpKernelConstruction* construction) : ParallelKernel(construction) {
    OP_REQUIRES_OK(construction, attributes_.Read(*construction));
  }

  void Compute(OpKernelContext* ctx) final {
    std::vector<ClipItem> items;
    for (int i = 0; i < attributes_.count; ++i) {
      const Tensor& gradient = ctx->input(i);
      const Tensor& weights = ctx->input(attributes_.count + i);
      ClipItem item = {};
      OP_REQUIRES_OK(ctx,
                     CheckClipped(i, gradient.shape(), weights.shape(), &item.rows, &item.units));
      Tensor* clipped = nullptr;
      // In the gradient's own memory, where nothing else reads it.
      OP_REQUIRES_OK(ctx,
                     ctx->forward_input_or_allocate_output({i}, i, gradient.shape(), &clipped));
      item.gradient = static_cast<const float*>(gradient.data());
      item.weights = static_cast<const float*>(weights.data());
      item.clipped = static_cast<float*>(clipped->data());
      items.push_back(item);
    }
    OP_REQUIRES_OK(ctx, Launchers::Clip(ctx, items, attributes_.settings));
  }

 private:
  ClipAttributes attributes_;
};

REGISTER_KERNEL_BUILDER(Name("AccumOps>ClipUnits").Device(tensorflow::DEVICE_CPU),
                        ClipUnitsOp<Cpu>);
#if defined(ACCUMOPS_CUDA)
REGISTER_KERNEL_BUILDER(Name("AccumOps>ClipUnits").Device(tensorflow::DEVICE_GPU),
                        ClipUnitsOp<Gpu>);
#endif

}  // namespace
}  // namespace accumops
