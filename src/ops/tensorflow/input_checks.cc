#include "input_checks.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "accumulate.h"
#include "kernel_support.h"
#include "moments.h"
#include "noise.h"

namespace accumops {
namespace {

// Checks that variable i is of this type and shape.
absl::Status CheckVariable(const Variables& variables, std::size_t i, DataType dtype,
                           const TensorShape& shape) {
  if (variables.dtype(i) == dtype && variables.shape(i) == shape) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(variables.Describe(i), " is ", DataTypeString(variables.dtype(i)), " of shape ",
                   variables.shape(i).DebugString(), "; it must be ", DataTypeString(dtype),
                   " of shape ", shape.DebugString(), "."));
}

// Checks that variable `flags` has a flag for each row of variable `table`.
absl::Status CheckFlags(const Variables& variables, std::size_t flags, std::size_t table) {
  const TensorShape& shape = variables.shape(table);
  if (variables.dtype(flags) == tensorflow::DT_BOOL && shape.dims() > 0 &&
      variables.shape(flags) == TensorShape({shape.dim_size(0)})) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      variables.Describe(flags), " is ", DataTypeString(variables.dtype(flags)), " of shape ",
      variables.shape(flags).DebugString(), "; it must be bool with a flag for each row of ",
      variables.Describe(table), ", of shape ", shape.DebugString(), "."));
}

// Two variables from `first` on: a window's counters and moments.
absl::Status CheckWindow(const Variables& variables, std::size_t first, std::int64_t channels) {
  TF_RETURN_IF_ERROR(CheckVariable(variables, first, tensorflow::DT_INT64,
                                   TensorShape({MomentsWindow::kCounters})));
  return CheckVariable(variables, first + 1, tensorflow::DT_DOUBLE, TensorShape({2, channels}));
}

// Two variables from `first` on: a running mean and variance.
absl::Status CheckMoving(const Variables& variables, std::size_t first, std::int64_t channels) {
  const bool wide = variables.dtype(first) == tensorflow::DT_DOUBLE;
  for (std::size_t i = first; i < first + 2; ++i) {
    TF_RETURN_IF_ERROR(CheckVariable(variables, i,
                                     wide ? tensorflow::DT_DOUBLE : tensorflow::DT_FLOAT,
                                     TensorShape({channels})));
  }
  return absl::OkStatus();
}

absl::Status CheckCount(const char* what, std::size_t count, const char* expected, bool right) {
  if (right) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(what, " must be ", expected, ", not ", count, "."));
}

}  // namespace

absl::Status NotOneVariable(const char* list, int position, const std::string& shape) {
  return absl::InvalidArgumentError(absl::StrCat(
      list, "[", position, "] is not one variable but a tensor of shape ", shape, "."));
}

absl::Status Uninitialized(const Variables& variables, std::size_t i) {
  return absl::FailedPreconditionError(absl::StrCat(variables.Describe(i), " is uninitialized."));
}

absl::Status GivenTwice(const Variables& variables, std::size_t i, std::size_t j) {
  return absl::InvalidArgumentError(absl::StrCat(variables.Describe(std::max(i, j)), " and ",
                                                 variables.Describe(std::min(i, j)),
                                                 " are the same variable; give it once."));
}

absl::Status CheckScalar(const char* name, const TensorShape& shape) {
  if (shape.dims() == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " must be a scalar, not of shape ", shape.DebugString(), "."));
}

absl::Status NotOneFlag(const char* name) {
  return absl::InvalidArgumentError(absl::StrCat(name, " must be one scalar or none."));
}

absl::Status CheckAccumulator(const Variables& variables, const AccumulateAttributes& attributes,
                              std::size_t i, DataType gradient_dtype, const TensorShape& gradient,
                              const TensorShape* indices) {
  const DataType dtype = variables.dtype(i);
  if ((dtype != tensorflow::DT_FLOAT && dtype != tensorflow::DT_DOUBLE) ||
      !CanAccumulate(ToDType(dtype), ToDType(gradient_dtype))) {
    return absl::InvalidArgumentError(
        absl::StrCat(variables.Describe(i), " is ", DataTypeString(dtype), " and gradients[", i,
                     "] is ", DataTypeString(gradient_dtype),
                     ": accumulators are float32, or float64, which float64 gradients need."));
  }
  const TensorShape& shape = variables.shape(i);
  if (indices == nullptr) {
    if (gradient == shape) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(variables.Describe(i), " has shape ",
                                                   shape.DebugString(), " but gradients[", i,
                                                   "] has shape ", gradient.DebugString(), "."));
  }
  TensorShape expected = shape;
  if (shape.dims() > 0 && indices->dims() == 1) expected.set_dim(0, indices->dim_size(0));
  if (indices->dims() != 1 || shape.dims() == 0 || gradient != expected) {
    return absl::InvalidArgumentError(
        absl::StrCat(variables.Describe(i), " has shape ", shape.DebugString(), " but gradients[",
                     i, "] has shape ", gradient.DebugString(), " and indices[",
                     i - attributes.dense(), "] has shape ", indices->DebugString(), "."));
  }
  return i < attributes.untracked() ? absl::OkStatus()
                                    : CheckFlags(variables, attributes.FlagsOf(i), i);
}

absl::Status CheckUpdate(const Variables& variables, const UpdateAttributes& attributes) {
  const int alike = attributes.count + attributes.slots + attributes.accumulators;
  for (int i = 0; i < alike; ++i) {
    const auto variable = static_cast<std::size_t>(i % attributes.count);
    TF_RETURN_IF_ERROR(CheckVariable(variables, static_cast<std::size_t>(i), tensorflow::DT_FLOAT,
                                     variables.shape(variable)));
  }
  for (std::size_t k = 0; k < attributes.rows_of.size(); ++k) {
    TF_RETURN_IF_ERROR(CheckFlags(variables, static_cast<std::size_t>(alike) + k,
                                  static_cast<std::size_t>(attributes.rows_of[k])));
  }
  return absl::OkStatus();
}

absl::Status CheckLatest(const Variables& variables, std::size_t i, const TensorShape& latest) {
  if (latest == variables.shape(i)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(variables.Describe(i), " has shape ",
                                                 variables.shape(i).DebugString(), " but latest[",
                                                 i, "] has shape ", latest.DebugString(), "."));
}

absl::Status CheckScales(const TensorShape& scales, int count) {
  if (scales.dims() == 0 || scales == TensorShape({count})) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("scales must be a scalar or have one for each of ",
                                                 count, " variables, not be of shape ",
                                                 scales.DebugString(), "."));
}

absl::Status CheckMoments(const Variables& variables, const MomentsAttributes& attributes,
                          const std::vector<TensorShape>& moments, std::int64_t* channels) {
  const auto moving = static_cast<std::size_t>(attributes.window);
  const TensorShape& shape = moments.empty() ? variables.shape(moving) : moments[0];
  if (shape.dims() != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(moments.empty() ? variables.Describe(moving) : "moments[0]", " has shape ",
                     shape.DebugString(), "; moments must be vectors."));
  }
  for (std::size_t i = 1; i < moments.size(); ++i) {
    if (moments[i] != shape) {
      return absl::InvalidArgumentError(absl::StrCat("moments[", i, "] has shape ",
                                                     moments[i].DebugString(), ", not ",
                                                     shape.DebugString(), "."));
    }
  }
  *channels = shape.dim_size(0);
  if (attributes.window != 0) TF_RETURN_IF_ERROR(CheckWindow(variables, 0, *channels));
  return attributes.moving == 0 ? absl::OkStatus() : CheckMoving(variables, moving, *channels);
}

absl::Status CheckWindows(const Variables& variables, int windows, bool moving,
                          std::vector<std::int64_t>* channels) {
  const auto count = static_cast<std::size_t>(windows);
  for (std::size_t i = 0; i < count; ++i) {
    const TensorShape& moments = variables.shape(2 * i + 1);
    // CheckWindow says what is wrong with any other shape.
    channels->push_back(moments.dims() == 2 ? moments.dim_size(1) : 0);
    TF_RETURN_IF_ERROR(CheckWindow(variables, 2 * i, channels->back()));
    if (moving) TF_RETURN_IF_ERROR(CheckMoving(variables, 2 * (count + i), channels->back()));
  }
  return absl::OkStatus();
}

absl::Status CheckMomenta(const EndWindowsAttributes& attributes, const TensorShape& momenta) {
  const int expected = attributes.moving ? attributes.windows : 0;
  if (momenta == TensorShape({expected})) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("momenta has shape ", momenta.DebugString(),
                                                 "; it must have one for each of ", expected,
                                                 " pairs of moving statistics."));
}

absl::Status CheckNoiseGroup(const Variables& variables, std::size_t count,
                             const TensorShape& norms) {
  TF_RETURN_IF_ERROR(CheckCount("window", count, "one variable", count == 1));
  if (norms.dims() != 2 || norms.dim_size(0) != 2) {
    return absl::InvalidArgumentError(absl::StrCat("norms has shape ", norms.DebugString(),
                                                   "; it must be [2, number of gradients]."));
  }
  return CheckVariable(variables, 0, tensorflow::DT_DOUBLE, TensorShape({NoiseWindow::kSize}));
}

absl::Status CheckNoiseEnd(const Variables& variables, std::size_t count,
                           const TensorShape& window) {
  TF_RETURN_IF_ERROR(CheckCount("statistics", count, "three variables", count == 3));
  if (window != TensorShape({NoiseWindow::kSize})) {
    return absl::InvalidArgumentError(absl::StrCat("window has shape ", window.DebugString(),
                                                   "; it must be [", NoiseWindow::kSize, "]."));
  }
  TF_RETURN_IF_ERROR(CheckVariable(variables, 0, tensorflow::DT_DOUBLE,
                                   TensorShape({NoiseStatistics::kAverages})));
  TF_RETURN_IF_ERROR(CheckVariable(variables, 1, tensorflow::DT_DOUBLE, TensorShape({})));
  return CheckVariable(variables, 2, tensorflow::DT_INT64, TensorShape({NoiseStatistics::kEnded}));
}

absl::Status CheckClipped(int i, const TensorShape& gradient, const TensorShape& weights,
                          std::int64_t* rows, std::int64_t* units) {
  if (gradient != weights) {
    return absl::InvalidArgumentError(absl::StrCat("gradients[", i, "] has shape ",
                                                   gradient.DebugString(), " but weights[", i,
                                                   "] has shape ", weights.DebugString(), "."));
  }
  *units = gradient.dims() < 2 ? 1 : gradient.dim_size(gradient.dims() - 1);
  *rows = *units == 0 ? 0 : gradient.num_elements() / *units;
  return absl::OkStatus();
}

absl::Status CheckAxis(int axis, const TensorShape& x) {
  if (axis >= 0 && axis < x.dims()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("axis is ", axis, ", but x has shape ", x.DebugString(), "."));
}

absl::Status CheckChannels(const char* name, const TensorShape& shape, std::int64_t channels) {
  if (shape == TensorShape({channels})) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " has shape ", shape.DebugString(),
                                                 "; it must have a value for each of ", channels,
                                                 " channels."));
}

absl::Status CheckMask(int axis, const TensorShape& x, const TensorShape& mask) {
  if (axis != x.dims() - 1) {
    return absl::InvalidArgumentError(absl::StrCat(
        "A mask needs channels in the last dimension, not in ", axis, " of ", x.dims(), "."));
  }
  TensorShape expected = x;
  expected.RemoveLastDims(1);
  if (mask == expected) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("mask has shape ", mask.DebugString(),
                                                 "; for x of shape ", x.DebugString(),
                                                 " it must be ", expected.DebugString(), "."));
}

absl::Status CheckGradient(const TensorShape& dy, const TensorShape& x) {
  if (dy == x) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("dy has shape ", dy.DebugString(), " and x has shape ", x.DebugString(), "."));
}

}  // namespace accumops
