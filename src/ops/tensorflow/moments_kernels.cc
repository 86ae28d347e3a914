// AccumOps>MergeMoments on the CPU and, where the library has CUDA kernels, on GPUs: checks the
// inputs, calls a launcher.
#include "absl/strings/str_cat.h"
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

absl::Status CheckVariable(const VariableList& variables, std::size_t i, DataType dtype,
                           const TensorShape& shape) {
  const Tensor& variable = variables.tensor(i);
  if (variable.dtype() == dtype && variable.shape() == shape) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(variables.Describe(i), " is ", DataTypeString(variable.dtype()), " of shape ",
                   variable.shape().DebugString(), "; it must be ", DataTypeString(dtype),
                   " of shape ", shape.DebugString(), "."));
}

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
    const std::size_t moving = static_cast<std::size_t>(attributes_.window);
    TensorShape shape;
    if (attributes_.batches != 0) {
      shape = moments[0].shape();
    } else {
      shape = variables.tensor(moving).shape();
    }
    OP_REQUIRES(ctx, shape.dims() == 1,
                absl::InvalidArgumentError(absl::StrCat("Moments have shape ", shape.DebugString(),
                                                        "; they must be vectors.")));
    args.channels = shape.dim_size(0);
    OP_REQUIRES_OK(ctx, ReadBatch(ctx, moments, shape, &args.batch));
    const Tensor* momentum = nullptr;
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "momentum", &momentum));
    if (attributes_.window != 0) {
      OP_REQUIRES_OK(ctx, CheckVariable(variables, 0, tensorflow::DT_INT64,
                                        TensorShape({MomentsWindow::kCounters})));
      OP_REQUIRES_OK(
          ctx, CheckVariable(variables, 1, tensorflow::DT_DOUBLE, TensorShape({2, args.channels})));
    }
    if (attributes_.moving != 0) {
      const DataType dtype = variables.tensor(moving).dtype();
      const bool wide = dtype == tensorflow::DT_DOUBLE;
      for (std::size_t i = moving; i < moving + 2; ++i) {
        OP_REQUIRES_OK(ctx,
                       CheckVariable(variables, i, wide ? dtype : tensorflow::DT_FLOAT, shape));
      }
    }
    OP_REQUIRES_OK(ctx, variables.MakeWritable(ctx, Launchers::kCopy, variables.size()));
    if (attributes_.window != 0) {
      auto* const values = static_cast<double*>(variables.tensor(1).data());
      args.window = {static_cast<std::int64_t*>(variables.tensor(0).data()), values,
                     values + args.channels};
    }
    if (attributes_.moving != 0) {
      args.moving = {variables.tensor(moving).data(), variables.tensor(moving + 1).data(),
                     ToDType(variables.tensor(moving).dtype()), momentum->scalar<double>()()};
    }
    OP_REQUIRES_OK(ctx, Launchers::Merge(ctx, args));
  }

 private:
  absl::Status ReadBatch(OpKernelContext* ctx, const OpInputList& moments, const TensorShape& shape,
                         BatchMoments* batch) const {
    if (attributes_.batches == 0) return absl::OkStatus();
    for (int i = 1; i < 3; ++i) {
      if (moments[i].shape() != shape) {
        return absl::InvalidArgumentError(absl::StrCat("moments[", i, "] has shape ",
                                                       moments[i].shape().DebugString(), ", not ",
                                                       shape.DebugString(), "."));
      }
    }
    const Tensor* count = nullptr;  // the one item of its list
    TF_RETURN_IF_ERROR(RequireScalar(ctx, "count", &count));
    *batch = {count->scalar<std::int64_t>().data(), moments[0].data(), moments[1].data(),
              moments[2].data(), ToDType(moments[0].dtype())};
    return absl::OkStatus();
  }

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
