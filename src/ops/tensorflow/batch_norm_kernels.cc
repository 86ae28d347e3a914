// AccumOps>BatchNorm and its relatives on the CPU and, where the library has CUDA kernels, on GPUs:
// check the inputs, call a launcher.
#include "absl/strings/str_cat.h"
#include "batch_norm.h"
#include "kernel_support.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace accumops {
namespace {

// The launchers of a device.
struct Cpu {
  static absl::Status Forward(OpKernelContext* ctx, const BatchNormForward& args) {
    PoolExecutor executor(ctx);
    BatchNormForwardCpu(args, executor);
    return absl::OkStatus();
  }
  static absl::Status Inference(OpKernelContext* ctx, const BatchNormInference& args) {
    PoolExecutor executor(ctx);
    BatchNormInferenceCpu(args, executor);
    return absl::OkStatus();
  }
  static absl::Status Gradient(OpKernelContext* ctx, const BatchNormGradient& args) {
    PoolExecutor executor(ctx);
    BatchNormGradientCpu(args, executor);
    return absl::OkStatus();
  }
  // Whether a result may be written over the array that it is made from.
  static constexpr bool kInPlace = true;
};

#if defined(ACCUMOPS_CUDA)
struct Gpu {
  static absl::Status Forward(OpKernelContext* ctx, const BatchNormForward& args) {
    Tensor workspace;
    TF_RETURN_IF_ERROR(Allocate(ctx, args.shape, args.dtype, &workspace));
    return FromCuda(BatchNormForwardCuda(args, workspace.data(), CudaStream(ctx)));
  }
  static absl::Status Inference(OpKernelContext* ctx, const BatchNormInference& args) {
    return FromCuda(BatchNormInferenceCuda(args, CudaStream(ctx)));
  }
  static absl::Status Gradient(OpKernelContext* ctx, const BatchNormGradient& args) {
    Tensor workspace;
    TF_RETURN_IF_ERROR(Allocate(ctx, args.shape, args.dtype, &workspace));
    return FromCuda(BatchNormGradientCuda(args, workspace.data(), CudaStream(ctx)));
  }
  // The kernels read through a cache that does not see what they write.
  static constexpr bool kInPlace = false;

 private:
  static absl::Status Allocate(OpKernelContext* ctx, const BatchNormShape& shape, DType dtype,
                               Tensor* workspace) {
    return ctx->allocate_temp(tensorflow::DT_UINT8,
                              TensorShape({BatchNormWorkspaceCuda(shape, dtype)}), workspace);
  }
};
#endif

// Reads the attributes, and what they say about an array.
class BatchNormOpBase : public ParallelKernel {
 public:
  explicit BatchNormOpBase(OpKernelConstruction* construction) : ParallelKernel(construction) {
    OP_REQUIRES_OK(construction, construction->GetAttr("axis", &axis_));
    DataType data, statistics;
    OP_REQUIRES_OK(construction, construction->GetAttr("T", &data));
    OP_REQUIRES_OK(construction, construction->GetAttr("U", &statistics));
    OP_REQUIRES(construction, StatisticsType(ToDType(data)) == ToDType(statistics),
                absl::InvalidArgumentError(absl::StrCat(
                    "x is ", DataTypeString(data), " and its statistics are ",
                    DataTypeString(statistics), ": they are double for double data, else float.")));
    dtype_ = ToDType(data);
    int masks = 0;
    if (construction->HasAttr("mask_count")) {
      OP_REQUIRES_OK(construction, construction->GetAttr("mask_count", &masks));
    }
    OP_REQUIRES(
        construction, masks <= 1,
        absl::InvalidArgumentError(absl::StrCat("mask_count must be 0 or 1, not ", masks, ".")));
    if (construction->HasAttr("epsilon")) {
      OP_REQUIRES_OK(construction, construction->GetAttr("epsilon", &epsilon_));
      OP_REQUIRES(construction, epsilon_ >= 0,
                  absl::InvalidArgumentError(
                      absl::StrCat("epsilon must not be negative, not ", epsilon_, ".")));
    }
  }

 protected:
  absl::Status Shape(const Tensor& x, BatchNormShape* shape) const {
    if (axis_ < 0 || axis_ >= x.dims()) {
      return absl::InvalidArgumentError(
          absl::StrCat("axis is ", axis_, ", but x has shape ", x.shape().DebugString(), "."));
    }
    *shape = {1, x.dim_size(axis_), 1};
    for (int i = 0; i < axis_; ++i) shape->outer *= x.dim_size(i);
    for (int i = axis_ + 1; i < x.dims(); ++i) shape->inner *= x.dim_size(i);
    // An array without values may have any number of rows: no kernel has to go through them.
    if (shape->inner == 0) *shape = {0, shape->channels, 1};
    return absl::OkStatus();
  }

  // Checks that inputs [first, last) have a value for each channel.
  static absl::Status CheckChannels(OpKernelContext* ctx, int first, int last,
                                    std::int64_t channels) {
    for (int i = first; i < last; ++i) {
      TF_RETURN_IF_ERROR(RequireChannels(i, ctx->input(i).shape(), channels));
    }
    return absl::OkStatus();
  }

  // The mask's values, or null where there is none.
  absl::Status Mask(OpKernelContext* ctx, const Tensor& x, const bool** mask) const {
    OpInputList masks;
    TF_RETURN_IF_ERROR(ctx->input_list("mask", &masks));
    *mask = nullptr;
    if (masks.size() == 0) return absl::OkStatus();
    TensorShape expected = x.shape();
    if (axis_ != x.dims() - 1) {
      return absl::InvalidArgumentError(absl::StrCat(
          "A mask needs channels in the last dimension, not in ", axis_, " of ", x.dims(), "."));
    }
    expected.RemoveLastDims(1);
    if (masks[0].shape() != expected) {
      return absl::InvalidArgumentError(
          absl::StrCat("mask has shape ", masks[0].shape().DebugString(), "; for x of shape ",
                       x.shape().DebugString(), " it must be ", expected.DebugString(), "."));
    }
    *mask = static_cast<const bool*>(masks[0].data());
    return absl::OkStatus();
  }

  int axis_ = 0;
  float epsilon_ = 0;
  DType dtype_ = DType::kFloat32;
};

// Output 0: in the memory of an input that nothing else reads, where the device allows it.
template <typename Launchers>
absl::Status InPlaceOf(OpKernelContext* ctx, int input, Tensor** output) {
  const TensorShape& shape = ctx->input(input).shape();
  return Launchers::kInPlace ? ctx->forward_input_or_allocate_output({input}, 0, shape, output)
                             : ctx->allocate_output(0, shape, output);
}

template <typename Launchers>
class BatchNormOp : public BatchNormOpBase {
 public:
  using BatchNormOpBase::BatchNormOpBase;

  void Compute(OpKernelContext* ctx) final {
    const Tensor& x = ctx->input(0);
    BatchNormForward args = {};
    OP_REQUIRES_OK(ctx, Shape(x, &args.shape));
    OP_REQUIRES_OK(ctx, CheckChannels(ctx, 1, 3, args.shape.channels));
    OP_REQUIRES_OK(ctx, Mask(ctx, x, &args.mask));
    Tensor* outputs[6];
    for (int i = 0; i < 6; ++i) {
      const TensorShape shape = i == 0   ? x.shape()
                                : i == 5 ? TensorShape({})
                                         : TensorShape({args.shape.channels});
      OP_REQUIRES_OK(ctx, ctx->allocate_output(i, shape, &outputs[i]));
    }
    args.dtype = dtype_;
    args.x = x.data();
    args.y = outputs[0]->data();
    args.gamma = ctx->input(1).data();
    args.beta = ctx->input(2).data();
    args.epsilon = static_cast<double>(epsilon_);
    args.statistics = {outputs[1]->data(), outputs[2]->data(), outputs[3]->data(),
                       outputs[4]->data()};
    args.count = outputs[5]->scalar<std::int64_t>().data();
    OP_REQUIRES_OK(ctx, Launchers::Forward(ctx, args));
  }
};

template <typename Launchers>
class BatchNormGradOp : public BatchNormOpBase {
 public:
  using BatchNormOpBase::BatchNormOpBase;

  void Compute(OpKernelContext* ctx) final {
    const Tensor& dy = ctx->input(0);
    const Tensor& x = ctx->input(1);
    BatchNormGradient args = {};
    OP_REQUIRES_OK(ctx, Shape(x, &args.shape));
    OP_REQUIRES(ctx, dy.shape() == x.shape(),
                absl::InvalidArgumentError(absl::StrCat("dy has shape ", dy.shape().DebugString(),
                                                        " and x has shape ",
                                                        x.shape().DebugString(), ".")));
    OP_REQUIRES_OK(ctx, CheckChannels(ctx, 2, 6, args.shape.channels));
    const Tensor* count = nullptr;
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "count", &count));
    OP_REQUIRES_OK(ctx, Mask(ctx, x, &args.mask));
    Tensor* outputs[3];
    OP_REQUIRES_OK(ctx, InPlaceOf<Launchers>(ctx, 0, &outputs[0]));
    for (int i = 1; i < 3; ++i) {
      OP_REQUIRES_OK(ctx, ctx->allocate_output(i, TensorShape({args.shape.channels}), &outputs[i]));
    }
    args.dtype = dtype_;
    args.x = x.data();
    args.dy = dy.data();
    args.dx = outputs[0]->data();
    args.gamma = ctx->input(2).data();
    args.statistics = {ctx->input(3).data(), ctx->input(4).data(), nullptr, ctx->input(5).data()};
    args.count = count->scalar<std::int64_t>().data();
    args.dgamma = outputs[1]->data();
    args.dbeta = outputs[2]->data();
    OP_REQUIRES_OK(ctx, Launchers::Gradient(ctx, args));
  }
};

template <typename Launchers>
class BatchNormInferenceOp : public BatchNormOpBase {
 public:
  using BatchNormOpBase::BatchNormOpBase;

  void Compute(OpKernelContext* ctx) final {
    const Tensor& x = ctx->input(0);
    BatchNormInference args = {};
    OP_REQUIRES_OK(ctx, Shape(x, &args.shape));
    OP_REQUIRES_OK(ctx, CheckChannels(ctx, 1, 5, args.shape.channels));
    Tensor* y = nullptr;
    OP_REQUIRES_OK(ctx, InPlaceOf<Launchers>(ctx, 0, &y));
    args.dtype = dtype_;
    args.x = x.data();
    args.y = y->data();
    args.gamma = ctx->input(1).data();
    args.beta = ctx->input(2).data();
    args.mean = ctx->input(3).data();
    args.variance = ctx->input(4).data();
    args.epsilon = static_cast<double>(epsilon_);
    OP_REQUIRES_OK(ctx, Launchers::Inference(ctx, args));
  }
};

#define ACCUMOPS_REGISTER(Launchers, DEVICE)                                                  \
  REGISTER_KERNEL_BUILDER(Name("AccumOps>BatchNorm").Device(DEVICE), BatchNormOp<Launchers>); \
  REGISTER_KERNEL_BUILDER(Name("AccumOps>BatchNormGrad").Device(DEVICE),                      \
                          BatchNormGradOp<Launchers>);                                        \
  REGISTER_KERNEL_BUILDER(Name("AccumOps>BatchNormInference").Device(DEVICE),                 \
                          BatchNormInferenceOp<Launchers>)

ACCUMOPS_REGISTER(Cpu, tensorflow::DEVICE_CPU);
#if defined(ACCUMOPS_CUDA)
ACCUMOPS_REGISTER(Gpu, tensorflow::DEVICE_GPU);
#endif

}  // namespace
}  // namespace accumops
