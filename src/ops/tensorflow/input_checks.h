// What an op's kernels and its lowering to XLA check of their inputs. The checks see types and
// shapes only, so that both refuse the same calls, in the same words.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "accumulate_attributes.h"
#include "moments_attributes.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "update_attributes.h"

namespace accumops {

using ::tensorflow::DataType;
using ::tensorflow::DataTypeString;
using ::tensorflow::TensorShape;

// The variables that an op is given, each of which has a value.
class Variables {
 public:
  virtual ~Variables() = default;
  virtual DataType dtype(std::size_t i) const = 0;
  virtual const TensorShape& shape(std::size_t i) const = 0;
  // What error messages call variable `i`, such as "accumulators[3] ('dense/kernel_accumulator')".
  virtual std::string Describe(std::size_t i) const = 0;
};

// The errors of variables that cannot be held together.
absl::Status NotOneVariable(const char* list, int position, const std::string& shape);
absl::Status Uninitialized(const Variables& variables, std::size_t i);
absl::Status GivenTwice(const Variables& variables, std::size_t i, std::size_t j);

absl::Status CheckScalar(const char* name, const TensorShape& shape);
// The error of an input that has to be a list of one scalar or none.
absl::Status NotOneFlag(const char* name);

// AccumOps>Accumulate, whose variables are the accumulators and then the touched rows: accumulator
// i with its gradient and, where it receives rows, their indices, else null.
absl::Status CheckAccumulator(const Variables& variables, const AccumulateAttributes& attributes,
                              std::size_t i, DataType gradient_dtype, const TensorShape& gradient,
                              const TensorShape* indices);

// AccumOps>Update, whose variables are the variables, the slots, the accumulators and the touched
// rows: all of them, the latest gradient of variable i, and the factors for gradients.
absl::Status CheckUpdate(const Variables& variables, const UpdateAttributes& attributes);
absl::Status CheckLatest(const Variables& variables, std::size_t i, const TensorShape& latest);
absl::Status CheckScales(const TensorShape& scales, int count);

// AccumOps>MergeMoments, whose variables are the window's and then the moving statistics. Finds the
// number of channels.
absl::Status CheckMoments(const Variables& variables, const MomentsAttributes& attributes,
                          const std::vector<TensorShape>& moments, std::int64_t* channels);

// AccumOps>AddToWindows and AccumOps>EndWindows, whose variables are those of all windows and then,
// if `moving`, those of all moving statistics. Adds each window's number of channels to `channels`.
absl::Status CheckWindows(const Variables& variables, int windows, bool moving,
                          std::vector<std::int64_t>* channels);
absl::Status CheckMomenta(const EndWindowsAttributes& attributes, const TensorShape& momenta);

// AccumOps>AddNoiseGroup, whose variable is the window, and AccumOps>EndNoiseWindow, whose
// variables are the statistics.
absl::Status CheckNoiseGroup(const Variables& variables, std::size_t count,
                             const TensorShape& norms);
absl::Status CheckNoiseEnd(const Variables& variables, std::size_t count,
                           const TensorShape& window);

// AccumOps>ClipUnits: gradient i and its weights. Finds rows and units.
absl::Status CheckClipped(int i, const TensorShape& gradient, const TensorShape& weights,
                          std::int64_t* rows, std::int64_t* units);

// AccumOps>BatchNorm and its relatives: the axis of x's channels, an input with a value for each
// channel, and a mask.
absl::Status CheckAxis(int axis, const TensorShape& x);
absl::Status CheckChannels(const char* name, const TensorShape& shape, std::int64_t channels);
absl::Status CheckMask(int axis, const TensorShape& x, const TensorShape& mask);
absl::Status CheckGradient(const TensorShape& dy, const TensorShape& x);

}  // namespace accumops
