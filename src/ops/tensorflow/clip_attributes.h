// The attributes of AccumOps>ClipUnits, as its kernels read them.
#pragma once

#include "clip_units.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace accumops {

struct ClipAttributes {
  int count = 0;  // gradients
  ClipSettings settings = {0, 0};

  absl::Status Read(const tensorflow::OpKernelConstruction& construction) {
    float clip_factor, epsilon;
    TF_RETURN_IF_ERROR(construction.GetAttr("N", &count));
    TF_RETURN_IF_ERROR(construction.GetAttr("clip_factor", &clip_factor));
    TF_RETURN_IF_ERROR(construction.GetAttr("epsilon", &epsilon));
    settings = {static_cast<double>(clip_factor), static_cast<double>(epsilon)};
    return absl::OkStatus();
  }
};

}  // namespace accumops
