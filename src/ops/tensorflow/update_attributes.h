// The attributes of AccumOps>Update, as its shape function and its kernels read them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "update.h"

namespace accumops {

struct UpdateAttributes {
  int count = 0;         // how many variables
  int slots = 0;         // how many slots all variables have together
  int accumulators = 0;  // as many as variables, or none
  bool has_latest = false;
  bool corrects_rate = false;  // by the number of updates before, an input
  std::vector<std::int64_t> rows_of;
  std::vector<bool> decays;
  UpdateSettings settings = {};

  // Reads them from an OpKernelConstruction or an InferenceContext.
  template <typename Context>
  absl::Status Read(Context& context) {
    std::string rule;
    std::vector<tensorflow::DataType> latest;
    int touched = 0, iterations = 0;
    TF_RETURN_IF_ERROR(context.GetAttr("N", &count));
    TF_RETURN_IF_ERROR(context.GetAttr("S", &slots));
    TF_RETURN_IF_ERROR(context.GetAttr("A", &accumulators));
    TF_RETURN_IF_ERROR(context.GetAttr("R", &touched));
    TF_RETURN_IF_ERROR(context.GetAttr("I", &iterations));
    TF_RETURN_IF_ERROR(context.GetAttr("rule", &rule));
    TF_RETURN_IF_ERROR(context.GetAttr("latest_types", &latest));
    TF_RETURN_IF_ERROR(context.GetAttr("rows_of", &rows_of));
    TF_RETURN_IF_ERROR(context.GetAttr("decays", &decays));
    TF_RETURN_IF_ERROR(context.GetAttr("beta_1", &settings.beta_1));
    TF_RETURN_IF_ERROR(context.GetAttr("beta_2", &settings.beta_2));
    TF_RETURN_IF_ERROR(context.GetAttr("new_1", &settings.new_1));
    TF_RETURN_IF_ERROR(context.GetAttr("new_2", &settings.new_2));
    TF_RETURN_IF_ERROR(context.GetAttr("epsilon", &settings.epsilon));
    TF_RETURN_IF_ERROR(context.GetAttr("clip", &settings.clip));
    TF_RETURN_IF_ERROR(FindRule(rule));
    has_latest = !latest.empty();
    corrects_rate = iterations == 1;
    if (iterations > (CorrectsBias(settings.rule) ? 1 : 0)) {
      return absl::InvalidArgumentError(
          absl::StrCat("Update by '", rule, "' got ", iterations, " iterations."));
    }
    return Check(rule, static_cast<int>(latest.size()), touched);
  }

 private:
  // Fails for a name that the op's signature admits and update.h does not list.
  absl::Status FindRule(const std::string& name) {
    std::string known;
    for (const NamedUpdateRule& each : kUpdateRules) {
      if (name == each.name) {
        settings.rule = each.rule;
        return absl::OkStatus();
      }
      absl::StrAppend(&known, known.empty() ? "'" : ", '", each.name, "'");
    }
    return absl::InvalidArgumentError(
        absl::StrCat("rule must be one of ", known, ", not '", name, "'."));
  }

  absl::Status Check(const std::string& rule, int latest, int touched) const {
    const auto optional = [this](int length) { return length == 0 || length == count; };
    if (slots != count * SlotsOf(settings.rule) || !optional(accumulators) || !optional(latest) ||
        (count > 0 && accumulators + latest == 0) || static_cast<int>(decays.size()) != count ||
        static_cast<int>(rows_of.size()) != touched) {
      return absl::InvalidArgumentError(absl::StrCat(
          "Update by '", rule, "' got ", count, " variables, ", slots, " slots, ", accumulators,
          " accumulators, ", latest, " latest gradients, ", decays.size(), " decays, ", touched,
          " touched rows and ", rows_of.size(), " rows_of."));
    }
    for (std::size_t i = 0; i < rows_of.size(); ++i) {
      if (rows_of[i] < 0 || rows_of[i] >= count || (i > 0 && rows_of[i] <= rows_of[i - 1])) {
        return absl::InvalidArgumentError(absl::StrCat(
            "rows_of must be ascending positions of variables. It has ", rows_of[i], "."));
      }
    }
    if (!(settings.clip >= 0)) {
      return absl::InvalidArgumentError(
          absl::StrCat("clip must not be negative, not ", settings.clip, "."));
    }
    return absl::OkStatus();
  }
};

}  // namespace accumops
