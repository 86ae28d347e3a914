// AccumOps>Accumulate on the CPU and, where the library has CUDA kernels, on GPUs: checks the
// inputs, calls a launcher.
#include <algorithm>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "accumulate.h"
#include "accumulate_attributes.h"
#include "accumulate_rows.h"
#include "input_checks.h"
#include "kernel_support.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "variable_list.h"
#if defined(ACCUMOPS_CUDA)
#include "device_memory.h"
#endif

namespace accumops {
namespace {

// The op's inputs, checked; alive for one call.
struct Inputs {
  explicit Inputs(const AccumulateAttributes& attributes) : attributes(attributes) {}

  const AccumulateAttributes& attributes;
  VariableList variables;  // the accumulators, then the touched rows
  OpInputList gradients;
  OpInputList indices;
  const Tensor* scale = nullptr;
  const Tensor* overwrite = nullptr;

  absl::Status Read(OpKernelContext* ctx);
  std::vector<AccumulateItem> DenseItems() const;
  std::vector<AccumulateRowsItem> RowsItems() const;
};

absl::Status Inputs::Read(OpKernelContext* ctx) {
  TF_RETURN_IF_ERROR(ctx->input_list("gradients", &gradients));
  TF_RETURN_IF_ERROR(ctx->input_list("indices", &indices));
  TF_RETURN_IF_ERROR(RequireScalar(ctx, "scale", &scale));
  TF_RETURN_IF_ERROR(RequireScalar(ctx, "overwrite", &overwrite));
  TF_RETURN_IF_ERROR(variables.Add(ctx, "accumulators"));
  TF_RETURN_IF_ERROR(variables.Add(ctx, "touched_rows"));
  TF_RETURN_IF_ERROR(variables.Lock());
  for (std::size_t i = 0; i < attributes.count; ++i) {
    const Tensor& gradient = gradients[static_cast<int>(i)];
    const TensorShape* rows = i < attributes.dense()
                                  ? nullptr
                                  : &indices[static_cast<int>(i - attributes.dense())].shape();
    TF_RETURN_IF_ERROR(
        CheckAccumulator(variables, attributes, i, gradient.dtype(), gradient.shape(), rows));
  }
  return absl::OkStatus();
}

std::vector<AccumulateItem> Inputs::DenseItems() const {
  std::vector<AccumulateItem> items;
  items.reserve(attributes.dense());
  for (std::size_t i = 0; i < attributes.dense(); ++i) {
    const Tensor& accumulator = variables.tensor(i);
    const Tensor& gradient = gradients[static_cast<int>(i)];
    items.push_back({accumulator.data(), gradient.data(), gradient.NumElements(),
                     ToDType(accumulator.dtype()), ToDType(gradient.dtype())});
  }
  return items;
}

std::vector<AccumulateRowsItem> Inputs::RowsItems() const {
  std::vector<AccumulateRowsItem> items;
  for (std::size_t i = attributes.dense(); i < attributes.count; ++i) {
    const Tensor& accumulator = variables.tensor(i);
    const Tensor& values = gradients[static_cast<int>(i)];
    const Tensor& rows = indices[static_cast<int>(i - attributes.dense())];
    const std::int64_t height = accumulator.dim_size(0);
    bool* const flags = i < attributes.untracked()
                            ? nullptr
                            : static_cast<bool*>(variables.tensor(attributes.FlagsOf(i)).data());
    items.push_back({accumulator.data(), values.data(), rows.data(), flags, height,
                     height == 0 ? 0 : accumulator.NumElements() / height, rows.NumElements(),
                     ToDType(accumulator.dtype()), ToDType(values.dtype()),
                     rows.dtype() == tensorflow::DT_INT64});
  }
  return items;
}

// The launchers of a device, and what stands around them.
struct Cpu {
  static absl::Status CheckIndices(const Inputs& inputs) {
    for (int i = 0; i < inputs.indices.size(); ++i) {
      const std::size_t table = inputs.attributes.dense() + static_cast<std::size_t>(i);
      const Tensor& rows = inputs.indices[i];
      const std::int64_t height = inputs.variables.shape(table).dim_size(0);
      const bool wide = rows.dtype() == tensorflow::DT_INT64;
      const std::int64_t bad = FindBadIndex(rows.data(), wide, rows.NumElements(), height);
      if (bad >= 0) {
        const std::int64_t row =
            wide ? rows.vec<std::int64_t>()(bad) : rows.vec<std::int32_t>()(bad);
        return absl::InvalidArgumentError(
            absl::StrCat("indices[", i, "][", bad, "] = ", row, " is not a row of ",
                         inputs.variables.Describe(table), ", which has ", height, " rows."));
      }
    }
    return absl::OkStatus();
  }
  static absl::Status Accumulate(OpKernelContext* ctx, const Inputs& inputs,
                                 const AccumulateReport& report) {
    const double scale = NumberOf(*inputs.scale);
    const bool overwrite = inputs.overwrite->scalar<bool>()();
    PoolExecutor executor(ctx);
    const auto items = inputs.DenseItems();
    AccumulateCpu(items.data(), items.size(), scale, overwrite, report, executor);
    for (const AccumulateRowsItem& item : inputs.RowsItems()) {
      AccumulateRowsCpu(item, scale, overwrite, report.all_finite, executor);
    }
    return absl::OkStatus();
  }
  static absl::Status SetTrue(OpKernelContext*, bool* flag) {
    *flag = true;
    return absl::OkStatus();
  }
  static absl::Status FillWithNan(OpKernelContext*, double* values, std::size_t count) {
    std::fill_n(values, count, std::numeric_limits<double>::quiet_NaN());
    return absl::OkStatus();
  }
  static constexpr CopyBytes kCopy = CopyOnHost;
};

#if defined(ACCUMOPS_CUDA)
struct Gpu {
  // The indices are in device memory: the kernel skips those that are no rows.
  static absl::Status CheckIndices(const Inputs&) { return absl::OkStatus(); }
  static absl::Status Accumulate(OpKernelContext* ctx, const Inputs& inputs,
                                 const AccumulateReport& report) {
    CUstream_st* stream = CudaStream(ctx);
    const DeviceScalar scale = {inputs.scale->data(), ToDType(inputs.scale->dtype())};
    const bool* overwrite = inputs.overwrite->scalar<bool>().data();
    const auto items = inputs.DenseItems();
    Tensor workspace;
    if (report.squared_norms != nullptr) {
      const auto bytes =
          static_cast<std::int64_t>(AccumulateNormsWorkspace(items.data(), items.size()));
      TF_RETURN_IF_ERROR(
          ctx->allocate_temp(tensorflow::DT_UINT8, TensorShape({bytes}), &workspace));
    }
    TF_RETURN_IF_ERROR(FromCuda(AccumulateCuda(items.data(), items.size(), scale, overwrite, report,
                                               workspace.data(), stream)));
    for (const AccumulateRowsItem& item : inputs.RowsItems()) {
      TF_RETURN_IF_ERROR(
          FromCuda(AccumulateRowsCuda(item, scale, overwrite, report.all_finite, stream)));
    }
    return absl::OkStatus();
  }
  static absl::Status SetTrue(OpKernelContext* ctx, bool* flag) {
    return FromCuda(SetFlagCuda(flag, true, CudaStream(ctx)));
  }
  static absl::Status FillWithNan(OpKernelContext* ctx, double* values, std::size_t count) {
    return FromCuda(FillWithNanCuda(values, count, CudaStream(ctx)));
  }
  static constexpr CopyBytes kCopy = CopyOnDevice;
};
#endif

template <typename Launchers>
class AccumulateOp : public ParallelKernel {
 public:
  explicit AccumulateOp(OpKernelConstruction* construction) : ParallelKernel(construction) {
    OP_REQUIRES_OK(construction, attributes_.Read(*construction));
  }

  // On an error nothing has been added to any variable, unless a GPU fails between two launches.
  void Compute(OpKernelContext* ctx) final {
    bool adds = true, wants_norms = true;
    OP_REQUIRES_OK(ctx, ReadOptionalFlag(ctx, "only_if", &adds));
    OP_REQUIRES_OK(ctx, ReadOptionalFlag(ctx, "norms_if", &wants_norms));
    AccumulateReport report;
    OP_REQUIRES_OK(ctx, StartReport(ctx, adds && wants_norms, &report));
    if (!adds) return;
    Inputs inputs(attributes_);
    OP_REQUIRES_OK(ctx, inputs.Read(ctx));
    OP_REQUIRES_OK(ctx, Launchers::CheckIndices(inputs));
    OP_REQUIRES_OK(ctx,
                   inputs.variables.MakeWritable(ctx, Launchers::kCopy, inputs.variables.size()));
    OP_REQUIRES_OK(ctx, Launchers::Accumulate(ctx, inputs, report));
  }

 private:
  // Makes the outputs, and gives them the values that they have where nothing is added.
  absl::Status StartReport(OpKernelContext* ctx, bool wants_norms, AccumulateReport* report) const {
    if (attributes_.check_finite) {
      Tensor* output = nullptr;
      TF_RETURN_IF_ERROR(ctx->allocate_output(0, TensorShape({}), &output));
      report->all_finite = output->scalar<bool>().data();
      TF_RETURN_IF_ERROR(Launchers::SetTrue(ctx, report->all_finite));
    }
    if (attributes_.squared_norms) {
      Tensor* output = nullptr;
      const TensorShape shape({2, static_cast<std::int64_t>(attributes_.dense())});
      TF_RETURN_IF_ERROR(ctx->allocate_output(attributes_.check_finite ? 1 : 0, shape, &output));
      auto* const norms = static_cast<double*>(output->data());
      if (wants_norms) {
        report->squared_norms = norms;
      } else {
        TF_RETURN_IF_ERROR(Launchers::FillWithNan(ctx, norms, 2 * attributes_.dense()));
      }
    }
    return absl::OkStatus();
  }

  AccumulateAttributes attributes_;
};

REGISTER_KERNEL_BUILDER(Name("AccumOps>Accumulate").Device(tensorflow::DEVICE_CPU),
                        AccumulateOp<Cpu>);
#if defined(ACCUMOPS_CUDA)
REGISTER_KERNEL_BUILDER(Name("AccumOps>Accumulate")
                            .Device(tensorflow::DEVICE_GPU)
                            .HostMemory("norms_if")
                            .HostMemory("only_if"),
                        AccumulateOp<Gpu>);
#endif

}  // namespace
}  // namespace accumops
