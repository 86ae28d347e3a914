// AccumOps>BatchNorm and its relatives on the CPU and, where the library has CUDA kernels, on GPUs:
// check the inputs, call a launcher.
#include <initializer_list>

#include "batch_norm.h"
#include "batch_norm_attributes.h"
#include "input_checks.h"
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
    OP_REQUIRES_OK(construction, attributes_.Read(*construction));
  }

 protected:
  absl::Status Shape(const Tensor& x, BatchNormShape* shape) const {
    TF_RETURN_IF_ERROR(CheckAxis(attributes_.axis, x.shape()));
    *shape = {1, x.dim_size(attributes_.axis), 1};
    for (int i = 0; i < attributes_.axis; ++i) shape->outer *= x.dim_size(i);
    for (int i = attributes_.axis + 1; i < x.dims(); ++i) shape->inner *= x.dim_size(i);
    // An array without values may have any number of rows: no kernel has to go through them.
    if (shape->inner == 0) *shape = {0, shape->channels, 1};
    return absl::OkStatus();
  }

  // Checks that these inputs have a value for each channel.
  static absl::Status RequireChannels(OpKernelContext* ctx,
                                      std::initializer_list<const char*> names,
                                      std::int64_t channels) {
    for (const char* name : names) {
      const Tensor* values = nullptr;
      TF_RETURN_IF_ERROR(ctx->input(name, &values));
      TF_RETURN_IF_ERROR(CheckChannels(name, values->shape(), channels));
    }
    return absl::OkStatus();
  }

  // The mask's values, or null where there is none.
  absl::Status Mask(OpKernelContext* ctx, const Tensor& x, const bool** mask) const {
    *mask = nullptr;
    if (attributes_.masks == 0) return absl::OkStatus();
    const Tensor* given = nullptr;  // the one item of its list
    TF_RETURN_IF_ERROR(ctx->input("mask", &given));
    TF_RETURN_IF_ERROR(CheckMask(attributes_.axis, x.shape(), given->shape()));
    *mask = static_cast<const bool*>(given->data());
    return absl::OkStatus();
  }

  DType dtype() const { return ToDType(attributes_.data); }
  double epsilon() const { return static_cast<double>(attributes_.epsilon); }

 private:
  BatchNormAttributes attributes_;
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
    OP_REQUIRES_OK(ctx, RequireChannels(ctx, {"gamma", "beta"}, args.shape.channels));
    OP_REQUIRES_OK(ctx, Mask(ctx, x, &args.mask));
    Tensor* outputs[6];
    for (int i = 0; i < 6; ++i) {
      const TensorShape shape = i == 0   ? x.shape()
                                : i == 5 ? TensorShape({})
                                         : TensorShape({args.shape.channels});
      OP_REQUIRES_OK(ctx, ctx->allocate_output(i, shape, &outputs[i]));
    }
    args.dtype = dtype();
    args.x = x.data();
    args.y = outputs[0]->data();
    args.gamma = ctx->input(1).data();
    args.beta = ctx->input(2).data();
    args.epsilon = epsilon();
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
    OP_REQUIRES_OK(ctx, CheckGradient(dy.shape(), x.shape()));
    OP_REQUIRES_OK(ctx,
                   RequireChannels(ctx, {"gamma", "mean", "rest", "inverse"}, args.shape.channels));
    const Tensor* count = nullptr;
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "count", &count));
    OP_REQUIRES_OK(ctx, Mask(ctx, x, &args.mask));
    Tensor* outputs[3];
    OP_REQUIRES_OK(ctx, InPlaceOf<Launchers>(ctx, 0, &outputs[0]));
    for (int i = 1; i < 3; ++i) {
      OP_REQUIRES_OK(ctx, ctx->allocate_output(i, TensorShape({args.shape.channels}), &outputs[i]));
    }
    args.dtype = dtype();
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
    OP_REQUIRES_OK(
        ctx, RequireChannels(ctx, {"gamma", "beta", "mean", "variance"}, args.shape.channels));
    Tensor* y = nullptr;
    OP_REQUIRES_OK(ctx, InPlaceOf<Launchers>(ctx, 0, &y));
    args.dtype = dtype();
    args.x = x.data();
    args.y = y->data();
    args.gamma = ctx->input(1).data();
    args.beta = ctx->input(2).data();
    args.mean = ctx->input(3).data();
    args.variance = ctx->input(4).data();
    args.epsilon = epsilon();
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
