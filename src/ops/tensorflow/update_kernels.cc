// AccumOps>Update and AccumOps>SquaredNorms on the CPU and, where the library has CUDA kernels, on
// GPUs: check the inputs, call a launcher.
#include <vector>

#include "input_checks.h"
#include "kernel_support.h"
#include "squared_norm.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "update.h"
#include "update_attributes.h"
#include "variable_list.h"

namespace accumops {
namespace {

// The launchers of a device.
struct Cpu {
  static absl::Status Update(OpKernelContext* ctx, const std::vector<UpdateItem>& items,
                             const UpdateSettings& settings, const UpdateScalars& scalars) {
    PoolExecutor executor(ctx);
    UpdateCpu(items.data(), items.size(), settings, scalars, executor);
    return absl::OkStatus();
  }
  static absl::Status SquaredNorms(OpKernelContext* ctx, const std::vector<SquaredNormItem>& items,
                                   double* sums) {
    PoolExecutor executor(ctx);
    SquaredNormsCpu(items.data(), items.size(), sums, executor);
    return absl::OkStatus();
  }
  static constexpr CopyBytes kCopy = CopyOnHost;
};

#if defined(ACCUMOPS_CUDA)
struct Gpu {
  static absl::Status Update(OpKernelContext* ctx, const std::vector<UpdateItem>& items,
                             const UpdateSettings& settings, UpdateScalars scalars) {
    Tensor rate;
    if (scalars.iterations != nullptr) {
      TF_RETURN_IF_ERROR(ctx->allocate_temp(tensorflow::DT_FLOAT, TensorShape({1}), &rate));
      scalars.corrected_rate = static_cast<float*>(rate.data());
    }
    return FromCuda(UpdateCuda(items.data(), items.size(), settings, scalars, CudaStream(ctx)));
  }
  static absl::Status SquaredNorms(OpKernelContext* ctx, const std::vector<SquaredNormItem>& items,
                                   double* sums) {
    Tensor workspace;
    const auto bytes = static_cast<std::int64_t>(SquaredNormsWorkspace(items.data(), items.size()));
    TF_RETURN_IF_ERROR(ctx->allocate_temp(tensorflow::DT_UINT8, TensorShape({bytes}), &workspace));
    return FromCuda(
        SquaredNormsCuda(items.data(), items.size(), sums, workspace.data(), CudaStream(ctx)));
  }
  static constexpr CopyBytes kCopy = CopyOnDevice;
};
#endif

// The inputs of one call, checked.
class UpdateInputs {
 public:
  explicit UpdateInputs(const UpdateAttributes& attributes) : attributes_(attributes) {}

  absl::Status Read(OpKernelContext* ctx);
  // Gives each variable and slot whose buffer a reader still holds a buffer of its own. On an error
  // all of them have the values that they had before.
  absl::Status MakeWritable(OpKernelContext* ctx, CopyBytes copy) {
    const int written = attributes_.count + attributes_.slots;
    return variables_.MakeWritable(ctx, copy, static_cast<std::size_t>(written));
  }
  std::vector<UpdateItem> Items() const;
  UpdateScalars Scalars() const;

 private:
  std::size_t slot(int slot, int i) const {
    return static_cast<std::size_t>((slot + 1) * attributes_.count + i);
  }
  std::size_t accumulator(int i) const {
    return static_cast<std::size_t>(attributes_.count + attributes_.slots + i);
  }
  std::size_t flags(int i) const { return accumulator(attributes_.accumulators + i); }

  const UpdateAttributes& attributes_;
  VariableList variables_;  // the variables, their slots, the accumulators, the touched rows
  OpInputList latest_;
  const Tensor* scales_ = nullptr;
  const Tensor* rate_ = nullptr;
  const Tensor* iterations_ = nullptr;  // null if the rate is not to be corrected
  const Tensor* decay_ = nullptr;
  const Tensor* weight_ = nullptr;
  const Tensor* overwrite_ = nullptr;
  const Tensor* applies_ = nullptr;
};

absl::Status UpdateInputs::Read(OpKernelContext* ctx) {
  TF_RETURN_IF_ERROR(ctx->input_list("latest", &latest_));
  TF_RETURN_IF_ERROR(RequireScalar(ctx, "rate", &rate_));
  if (attributes_.corrects_rate) {
    TF_RETURN_IF_ERROR(RequireScalar(ctx, "iterations", &iterations_));
  }
  TF_RETURN_IF_ERROR(RequireScalar(ctx, "decay", &decay_));
  TF_RETURN_IF_ERROR(RequireScalar(ctx, "weight", &weight_));
  TF_RETURN_IF_ERROR(RequireScalar(ctx, "overwrite", &overwrite_));
  TF_RETURN_IF_ERROR(RequireScalar(ctx, "applies", &applies_));
  TF_RETURN_IF_ERROR(ctx->input("scales", &scales_));
  TF_RETURN_IF_ERROR(CheckScales(scales_->shape(), attributes_.count));
  for (const char* name : {"variables", "slots", "accumulators", "touched_rows"}) {
    TF_RETURN_IF_ERROR(variables_.Add(ctx, name));
  }
  TF_RETURN_IF_ERROR(variables_.Lock());
  TF_RETURN_IF_ERROR(CheckUpdate(variables_, attributes_));
  for (int i = 0; i < latest_.size(); ++i) {
    TF_RETURN_IF_ERROR(CheckLatest(variables_, static_cast<std::size_t>(i), latest_[i].shape()));
  }
  return absl::OkStatus();
}

std::vector<UpdateItem> UpdateInputs::Items() const {
  const auto data = [this](std::size_t i) {
    return static_cast<float*>(variables_.tensor(i).data());
  };
  std::vector<UpdateItem> items(static_cast<std::size_t>(attributes_.count));
  for (int i = 0; i < attributes_.count; ++i) {
    const auto index = static_cast<std::size_t>(i);
    UpdateItem& item = items[index];
    item.value = data(index);
    for (int s = 0; s < SlotsOf(attributes_.settings.rule); ++s) item.slots[s] = data(slot(s, i));
    if (attributes_.accumulators > 0) item.accumulator = data(accumulator(i));
    item.latest_dtype = DType::kFloat32;
    if (attributes_.has_latest) {
      item.latest = latest_[i].data();
      item.latest_dtype = ToDType(latest_[i].dtype());
    }
    item.size = variables_.tensor(index).NumElements();
    item.row_size = 1;
    item.decays = attributes_.decays[index];
  }
  for (std::size_t i = 0; i < attributes_.rows_of.size(); ++i) {
    const auto index = static_cast<std::size_t>(attributes_.rows_of[i]);
    if (items[index].size == 0) continue;
    items[index].touched_rows =
        static_cast<const bool*>(variables_.tensor(flags(static_cast<int>(i))).data());
    items[index].row_size = items[index].size / variables_.tensor(index).dim_size(0);
  }
  return items;
}

UpdateScalars UpdateInputs::Scalars() const {
  const auto numbers = [](const Tensor* tensor) {
    return static_cast<const float*>(tensor->data());
  };
  const auto flag = [](const Tensor* tensor) { return static_cast<const bool*>(tensor->data()); };
  UpdateScalars scalars = {};
  scalars.scales = numbers(scales_);
  scalars.scale_for_each = scales_->dims() == 1;
  scalars.rate = numbers(rate_);
  if (iterations_ != nullptr) {
    scalars.iterations = static_cast<const std::int64_t*>(iterations_->data());
  }
  scalars.decay = numbers(decay_);
  scalars.weight = numbers(weight_);
  scalars.overwrite = flag(overwrite_);
  scalars.applies = flag(applies_);
  return scalars;
}

template <typename Launchers>
class UpdateOp : public ParallelKernel {
 public:
  explicit UpdateOp(OpKernelConstruction* construction) : ParallelKernel(construction) {
    OP_REQUIRES_OK(construction, attributes_.Read(*construction));
  }

  void Compute(OpKernelContext* ctx) final {
    bool updates = true;
    OP_REQUIRES_OK(ctx, ReadOptionalFlag(ctx, "only_if", &updates));
    if (!updates) return;
    UpdateInputs inputs(attributes_);
    OP_REQUIRES_OK(ctx, inputs.Read(ctx));
    OP_REQUIRES_OK(ctx, inputs.MakeWritable(ctx, Launchers::kCopy));
    OP_REQUIRES_OK(ctx,
                   Launchers::Update(ctx, inputs.Items(), attributes_.settings, inputs.Scalars()));
  }

 private:
  UpdateAttributes attributes_;
};

template <typename Launchers>
class SquaredNormsOp : public ParallelKernel {
 public:
  using ParallelKernel::ParallelKernel;

  void Compute(OpKernelContext* ctx) final {
    std::vector<SquaredNormItem> items;
    for (int i = 0; i < ctx->num_inputs(); ++i) {
      const Tensor& values = ctx->input(i);
      items.push_back({values.data(), values.NumElements(), ToDType(values.dtype())});
    }
    Tensor* sums = nullptr;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape({ctx->num_inputs()}), &sums));
    OP_REQUIRES_OK(ctx, Launchers::SquaredNorms(ctx, items, static_cast<double*>(sums->data())));
  }
};

#define ACCUMOPS_REGISTER(Launchers, DEVICE)                                            \
  REGISTER_KERNEL_BUILDER(Name("AccumOps>Update").Device(DEVICE).HostMemory("only_if"), \
                          UpdateOp<Launchers>);                                         \
  REGISTER_KERNEL_BUILDER(Name("AccumOps>SquaredNorms").Device(DEVICE), SquaredNormsOp<Launchers>)

ACCUMOPS_REGISTER(Cpu, tensorflow::DEVICE_CPU);
#if defined(ACCUMOPS_CUDA)
ACCUMOPS_REGISTER(Gpu, tensorflow::DEVICE_GPU);
#endif

}  // namespace
}  // namespace accumops
