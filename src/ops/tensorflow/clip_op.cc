// AccumOps>ClipUnits: its signature, and the shapes that can be checked when a graph is built.
#include "absl/strings/str_cat.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace accumops {
namespace {

using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

absl::Status ClipUnitsShapes(InferenceContext* c) {
  std::vector<ShapeHandle> gradients, weights;
  TF_RETURN_IF_ERROR(c->input("gradients", &gradients));
  TF_RETURN_IF_ERROR(c->input("weights", &weights));
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    ShapeHandle shape;
    const absl::Status status = c->Merge(gradients[i], weights[i], &shape);
    if (!status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "gradients[", i, "] of shape ", c->DebugString(gradients[i]), " does not fit weights[", i,
          "] of shape ", c->DebugString(weights[i]), ": ", status.message()));
    }
    c->set_output(static_cast<int>(i), shape);
  }
  return absl::OkStatus();
}

REGISTER_OP("AccumOps>ClipUnits")
    .Input("gradients: N * float")
    .Input("weights: N * float")
    .Output("clipped: N * float")
    .Attr("N: int >= 1")
    .Attr("clip_factor: float")
    .Attr("epsilon: float")
    .SetShapeFn(ClipUnitsShapes)
    .Doc(R"doc(
Adaptive gradient clipping: scales each unit of a gradient down whose norm is more than a share of its weights' norm.

A unit is all values at one index of the last axis; a vector or scalar is one unit.

gradients: The gradients.
weights: The weights of each gradient, of its shape.
clipped: The clipped gradients.
clip_factor: The largest norm of a unit's gradient, as a share of the norm of its weights.
epsilon: The smallest norm that weights count with.
)doc");

}  // namespace
}  // namespace accumops
