// The attributes of AccumOps>MergeMoments, AccumOps>AddToWindows and AccumOps>EndWindows, as their
// kernels read them.
#pragma once

#include "absl/strings/str_cat.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace accumops {

struct MomentsAttributes {
  int window = 0;   // variables: 0 or 2
  int moving = 0;   // variables: 0 or 2
  int batches = 0;  // 0 or 1; a batch has 3 moments
  bool only_finite = false;

  absl::Status Read(const tensorflow::OpKernelConstruction& construction) {
    int parts;
    TF_RETURN_IF_ERROR(construction.GetAttr("window_parts", &window));
    TF_RETURN_IF_ERROR(construction.GetAttr("moving_parts", &moving));
    TF_RETURN_IF_ERROR(construction.GetAttr("batches", &batches));
    TF_RETURN_IF_ERROR(construction.GetAttr("batch_parts", &parts));
    TF_RETURN_IF_ERROR(construction.GetAttr("only_finite", &only_finite));
    const bool whole = (window == 0 || window == 2) && (moving == 0 || moving == 2) &&
                       (batches == 0 || batches == 1) && parts == 3 * batches;
    if (whole && (window != 0) + (moving != 0) + batches >= 2) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("A merge needs two or all of a window's 2 variables, 2 moving statistics, and "
                     "a batch's count and 3 moments, not ",
                     window, ", ", moving, ", ", batches, " and ", parts, "."));
  }
};

struct AddToWindowsAttributes {
  int windows = 0;

  absl::Status Read(const tensorflow::OpKernelConstruction& construction) {
    int parts, moments;
    TF_RETURN_IF_ERROR(construction.GetAttr("window_parts", &parts));
    TF_RETURN_IF_ERROR(construction.GetAttr("batches", &windows));
    TF_RETURN_IF_ERROR(construction.GetAttr("batch_parts", &moments));
    if (parts == 2 * windows && moments == 3 * windows) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("Each window needs 2 variables, a count and 3 moments, not ", parts, ", ",
                     windows, " and ", moments, " in all."));
  }
};

struct EndWindowsAttributes {
  int windows = 0;
  bool moving = false;  // whether each window has moving statistics

  absl::Status Read(const tensorflow::OpKernelConstruction& construction) {
    int parts, moving_parts;
    TF_RETURN_IF_ERROR(construction.GetAttr("window_parts", &parts));
    TF_RETURN_IF_ERROR(construction.GetAttr("moving_parts", &moving_parts));
    windows = parts / 2;
    moving = moving_parts != 0;
    if (parts % 2 == 0 && (!moving || moving_parts == parts)) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("Each window needs 2 variables, and 2 moving statistics if any has them, not ",
                     parts, " and ", moving_parts, " in all."));
  }
};

}  // namespace accumops
