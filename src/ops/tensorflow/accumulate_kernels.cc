// AccumOps>Accumulate on the CPU and, where the library has CUDA kernels, on GPUs: checks the
// inputs, calls a launcher.
#include <algorithm>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "accumulate.h"
#include "accumulate_rows.h"
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
  VariableList variables;  // the accumulators, then the touched rows
  OpInputList gradients;
  OpInputList indices;
  const Tensor* scale = nullptr;
  const Tensor* overwrite = nullptr;
  bool wants_norms = true;    // if there is an output for them
  std::size_t dense = 0;      // accumulators before the ones that receive rows
  std::size_t untracked = 0;  // accumulators before the ones whose touched rows are known

  absl::Status Read(OpKernelContext* ctx);
  std::vector<AccumulateItem> DenseItems() const;
  std::vector<AccumulateRowsItem> RowsItems() const;

 private:
  absl::Status CheckAccumulator(std::size_t i) const;
  absl::Status CheckRows(std::size_t i, std::size_t sparse) const;
  // The position of the flags of accumulator i, which is tracked, among the variables.
  std::size_t FlagsOf(std::size_t i) const {
    return static_cast<std::size_t>(gradients.size()) + i - untracked;
  }
};

absl::Status Inputs::Read(OpKernelContext* ctx) {
  TF_RETURN_IF_ERROR(ctx->input_list("gradients", &gradients));
  TF_RETURN_IF_ERROR(ctx->input_list("indices", &indices));
  OpInputList accumulators, touched;
  TF_RETURN_IF_ERROR(ctx->input_list("accumulators", &accumulators));
  TF_RETURN_IF_ERROR(ctx->input_list("touched_rows", &touched));
  if (gradients.size() != accumulators.size() || indices.size() > accumulators.size() ||
      touched.size() > indices.size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "Accumulate got ", accumulators.size(), " accumulators, ", gradients.size(), " gradients, ",
        indices.size(), " indices and ", touched.size(), " touched rows."));
  }
  TF_RETURN_IF_ERROR(RequireScalar(ctx, "scale", &scale));
  TF_RETURN_IF_ERROR(RequireScalar(ctx, "overwrite", &overwrite));
  OpInputList norms_if;
  TF_RETURN_IF_ERROR(ctx->input_list("norms_if", &norms_if));
  if (norms_if.size() > 1 || (norms_if.size() == 1 && norms_if[0].dims() != 0)) {
    return absl::InvalidArgumentError("norms_if must be one scalar or none.");
  }
  wants_norms = norms_if.size() == 0 || norms_if[0].scalar<bool>()();
  dense = static_cast<std::size_t>(accumulators.size() - indices.size());
  untracked = static_cast<std::size_t>(accumulators.size() - touched.size());
  TF_RETURN_IF_ERROR(variables.Add(ctx, "accumulators"));
  TF_RETURN_IF_ERROR(variables.Add(ctx, "touched_rows"));
  TF_RETURN_IF_ERROR(variables.Lock());
  for (int i = 0; i < accumulators.size(); ++i) {
    TF_RETURN_IF_ERROR(CheckAccumulator(static_cast<std::size_t>(i)));
  }
  for (int i = 0; i < indices.size(); ++i) {
    TF_RETURN_IF_ERROR(CheckRows(dense + static_cast<std::size_t>(i), static_cast<std::size_t>(i)));
  }
  return absl::OkStatus();
}

absl::Status Inputs::CheckAccumulator(std::size_t i) const {
  const Tensor& accumulator = variables.tensor(i);
  const Tensor& gradient = gradients[static_cast<int>(i)];
  const DataType dtype = accumulator.dtype();
  if ((dtype != tensorflow::DT_FLOAT && dtype != tensorflow::DT_DOUBLE) ||
      !CanAccumulate(ToDType(dtype), ToDType(gradient.dtype()))) {
    return absl::InvalidArgumentError(
        absl::StrCat(variables.Describe(i), " is ", DataTypeString(dtype), " and gradients[", i,
                     "] is ", DataTypeString(gradient.dtype()),
                     ": accumulators are float32, or float64, which float64 gradients need."));
  }
  if (i < dense && accumulator.shape() != gradient.shape()) {
    return absl::InvalidArgumentError(
        absl::StrCat(variables.Describe(i), " has shape ", accumulator.shape().DebugString(),
                     " but gradients[", i, "] has shape ", gradient.shape().DebugString(), "."));
  }
  return absl::OkStatus();
}

absl::Status Inputs::CheckRows(std::size_t i, std::size_t sparse) const {
  const Tensor& accumulator = variables.tensor(i);
  const Tensor& values = gradients[static_cast<int>(i)];
  const Tensor& rows = indices[static_cast<int>(sparse)];
  TensorShape expected = accumulator.shape();
  if (expected.dims() > 0 && rows.dims() == 1) expected.set_dim(0, rows.dim_size(0));
  if (rows.dims() != 1 || accumulator.dims() == 0 || values.shape() != expected) {
    return absl::InvalidArgumentError(
        absl::StrCat(variables.Describe(i), " has shape ", accumulator.shape().DebugString(),
                     " but gradients[", i, "] has shape ", values.shape().DebugString(),
                     " and indices[", sparse, "] has shape ", rows.shape().DebugString(), "."));
  }
  if (i < untracked) return absl::OkStatus();
  const std::size_t flags = FlagsOf(i);
  const Tensor& touched = variables.tensor(flags);
  if (touched.dtype() != tensorflow::DT_BOOL ||
      touched.shape() != TensorShape({accumulator.dim_size(0)})) {
    return absl::InvalidArgumentError(absl::StrCat(
        variables.Describe(flags), " is ", DataTypeString(touched.dtype()), " of shape ",
        touched.shape().DebugString(), "; it must be bool of shape [", accumulator.dim_size(0),
        "], one flag for each row of ", variables.Describe(i), "."));
  }
  return absl::OkStatus();
}

std::vector<AccumulateItem> Inputs::DenseItems() const {
  std::vector<AccumulateItem> items;
  items.reserve(dense);
  for (std::size_t i = 0; i < dense; ++i) {
    const Tensor& accumulator = variables.tensor(i);
    const Tensor& gradient = gradients[static_cast<int>(i)];
    items.push_back({accumulator.data(), gradient.data(), gradient.NumElements(),
                     ToDType(accumulator.dtype()), ToDType(gradient.dtype())});
  }
  return items;
}

std::vector<AccumulateRowsItem> Inputs::RowsItems() const {
  const auto count = static_cast<std::size_t>(gradients.size());
  std::vector<AccumulateRowsItem> items;
  for (std::size_t i = dense; i < count; ++i) {
    const Tensor& accumulator = variables.tensor(i);
    const Tensor& values = gradients[static_cast<int>(i)];
    const Tensor& rows = indices[static_cast<int>(i - dense)];
    const std::int64_t height = accumulator.dim_size(0);
    items.push_back(
        {accumulator.data(), values.data(), rows.data(),
         i < untracked ? nullptr : static_cast<bool*>(variables.tensor(FlagsOf(i)).data()), height,
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
      const Tensor& rows = inputs.indices[i];
      const std::int64_t height = inputs.variables.tensor(inputs.dense + i).dim_size(0);
      const bool wide = rows.dtype() == tensorflow::DT_INT64;
      const std::int64_t bad = FindBadIndex(rows.data(), wide, rows.NumElements(), height);
      if (bad >= 0) {
        const std::int64_t row =
            wide ? rows.vec<std::int64_t>()(bad) : rows.vec<std::int32_t>()(bad);
        return absl::InvalidArgumentError(absl::StrCat(
            "indices[", i, "][", bad, "] = ", row, " is not a row of ",
            inputs.variables.Describe(inputs.dense + i), ", which has ", height, " rows."));
      }
    }
    return absl::OkStatus();
  }
  static absl::Status Accumulate(OpKernelContext* ctx, const Inputs& inputs,
                                 const AccumulateReport& report) {
    const double scale = inputs.scale->dtype() == tensorflow::DT_DOUBLE
                             ? inputs.scale->scalar<double>()()
                             : inputs.scale->scalar<float>()();
    const bool overwrite = inputs.overwrite->scalar<bool>()();
    PoolExecutor executor(ctx);
    if (report.all_finite != nullptr) *report.all_finite = true;
    const auto items = inputs.DenseItems();
    AccumulateCpu(items.data(), items.size(), scale, overwrite, report, executor);
    for (const AccumulateRowsItem& item : inputs.RowsItems()) {
      AccumulateRowsCpu(item, scale, overwrite, report.all_finite, executor);
    }
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
    if (report.all_finite != nullptr) {
      TF_RETURN_IF_ERROR(FromCuda(SetFlagCuda(report.all_finite, true, stream)));
    }
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
    OP_REQUIRES_OK(construction, ReadFlag(construction, "check_finite", &check_finite_));
    OP_REQUIRES_OK(construction, ReadFlag(construction, "squared_norms", &squared_norms_));
  }

  // On an error nothing has been added to any variable, unless a GPU fails between two launches.
  void Compute(OpKernelContext* ctx) final {
    AccumulateReport report;
    if (check_finite_) {
      Tensor* output = nullptr;
      OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape({}), &output));
      report.all_finite = output->scalar<bool>().data();
    }
    Inputs inputs;
    OP_REQUIRES_OK(ctx, inputs.Read(ctx));
    if (squared_norms_) {
      Tensor* output = nullptr;
      const TensorShape shape({2, static_cast<std::int64_t>(inputs.dense)});
      OP_REQUIRES_OK(ctx, ctx->allocate_output(check_finite_ ? 1 : 0, shape, &output));
      auto* const norms = static_cast<double*>(output->data());
      if (inputs.wants_norms) {
        report.squared_norms = norms;
      } else {
        OP_REQUIRES_OK(ctx, Launchers::FillWithNan(ctx, norms, 2 * inputs.dense));
      }
    }
    OP_REQUIRES_OK(ctx, Launchers::CheckIndices(inputs));
    OP_REQUIRES_OK(ctx,
                   inputs.variables.MakeWritable(ctx, Launchers::kCopy, inputs.variables.size()));
    OP_REQUIRES_OK(ctx, Launchers::Accumulate(ctx, inputs, report));
  }

 private:
  // Reads how many outputs of a kind there are: one or none.
  static absl::Status ReadFlag(OpKernelConstruction* construction, const char* name, bool* flag) {
    std::vector<DataType> outputs;
    TF_RETURN_IF_ERROR(construction->GetAttr(name, &outputs));
    if (outputs.size() > 1) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, " must have one item or none, not ", outputs.size(), "."));
    }
    *flag = outputs.size() == 1;
    return absl::OkStatus();
  }

  bool check_finite_ = false;
  bool squared_norms_ = false;
};

REGISTER_KERNEL_BUILDER(Name("AccumOps>Accumulate").Device(tensorflow::DEVICE_CPU),
                        AccumulateOp<Cpu>);
#if defined(ACCUMOPS_CUDA)
REGISTER_KERNEL_BUILDER(
    Name("AccumOps>Accumulate").Device(tensorflow::DEVICE_GPU).HostMemory("norms_if"),
    AccumulateOp<Gpu>);
#endif

}  // namespace
}  // namespace accumops
