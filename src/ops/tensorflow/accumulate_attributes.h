// The attributes of AccumOps>Accumulate, as its shape function and its kernels read them.
#pragma once

#include <cstddef>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace accumops {

struct AccumulateAttributes {
  std::size_t count = 0;    // accumulators
  std::size_t sparse = 0;   // the last of them, which receive rows
  std::size_t tracked = 0;  // the last of those, whose touched rows are known
  bool check_finite = false;
  bool squared_norms = false;

  std::size_t dense() const { return count - sparse; }
  std::size_t untracked() const { return count - tracked; }
  // The position of the flags of accumulator i, which is tracked, behind the accumulators.
  std::size_t FlagsOf(std::size_t i) const { return count + i - untracked(); }

  // Reads them from an OpKernelConstruction or an InferenceContext.
  template <typename Context>
  absl::Status Read(Context& context) {
    int accumulators = 0, touched = 0;
    std::vector<tensorflow::DataType> gradients, indices;
    TF_RETURN_IF_ERROR(context.GetAttr("N", &accumulators));
    TF_RETURN_IF_ERROR(context.GetAttr("M", &touched));
    TF_RETURN_IF_ERROR(context.GetAttr("gradient_types", &gradients));
    TF_RETURN_IF_ERROR(context.GetAttr("index_types", &indices));
    TF_RETURN_IF_ERROR(ReadFlag(context, "check_finite", &check_finite));
    TF_RETURN_IF_ERROR(ReadFlag(context, "squared_norms", &squared_norms));
    count = static_cast<std::size_t>(accumulators);
    sparse = indices.size();
    tracked = static_cast<std::size_t>(touched);
    if (gradients.size() == count && sparse <= count && tracked <= sparse) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(
        "Accumulate takes one gradient for each accumulator, at most as many indices, and at most "
        "as many touched rows as indices; got ",
        count, " accumulators, ", gradients.size(), " gradients, ", sparse, " indices and ",
        tracked, " touched rows."));
  }

 private:
  // Reads how many outputs of a kind there are: one or none.
  template <typename Context>
  static absl::Status ReadFlag(Context& context, const char* name, bool* flag) {
    std::vector<tensorflow::DataType> outputs;
    TF_RETURN_IF_ERROR(context.GetAttr(name, &outputs));
    if (outputs.size() > 1) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, " must have one item or none, not ", outputs.size(), "."));
    }
    *flag = outputs.size() == 1;
    return absl::OkStatus();
  }
};

}  // namespace accumops
