// The attributes of AccumOps>BatchNorm and its relatives, as their kernels read them.
#pragma once

#include "absl/strings/str_cat.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace accumops {

struct BatchNormAttributes {
  int axis = 0;
  int masks = 0;      // 0 or 1
  float epsilon = 0;  // 0 where the op has none
  tensorflow::DataType data = tensorflow::DT_FLOAT;
  tensorflow::DataType statistics = tensorflow::DT_FLOAT;

  absl::Status Read(const tensorflow::OpKernelConstruction& construction) {
    TF_RETURN_IF_ERROR(construction.GetAttr("axis", &axis));
    TF_RETURN_IF_ERROR(construction.GetAttr("T", &data));
    TF_RETURN_IF_ERROR(construction.GetAttr("U", &statistics));
    if ((data == tensorflow::DT_DOUBLE) != (statistics == tensorflow::DT_DOUBLE)) {
      return absl::InvalidArgumentError(
          absl::StrCat("x is ", tensorflow::DataTypeString(data), " and its statistics are ",
                       tensorflow::DataTypeString(statistics),
                       ": they are double for double data, else float."));
    }
    if (construction.HasAttr("mask_count")) {
      TF_RETURN_IF_ERROR(construction.GetAttr("mask_count", &masks));
    }
    if (masks > 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("mask_count must be 0 or 1, not ", masks, "."));
    }
    if (construction.HasAttr("epsilon")) {
      TF_RETURN_IF_ERROR(construction.GetAttr("epsilon", &epsilon));
    }
    if (!(epsilon >= 0)) {
      return absl::InvalidArgumentError(
          absl::StrCat("epsilon must not be negative, not ", epsilon, "."));
    }
    return absl::OkStatus();
  }
};

}  // namespace accumops
