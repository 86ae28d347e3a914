// AccumOps>AddNoiseGroup and AccumOps>EndNoiseWindow: their signatures, and the shapes that can be
// checked when a graph is built.
#include "shape_support.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace accumops {
namespace {

using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

absl::Status RequireRank(InferenceContext* c, const char* name, int rank) {
  std::vector<ShapeHandle> shapes;
  ShapeHandle unused;
  TF_RETURN_IF_ERROR(c->input(name, &shapes));
  return c->WithRank(shapes[0], rank, &unused);
}

absl::Status AddNoiseGroupShapes(InferenceContext* c) {
  TF_RETURN_IF_ERROR(RequireOneVariableEach(c, {"window"}));
  TF_RETURN_IF_ERROR(RequireRank(c, "norms", 2));
  for (const char* name : {"share", "starts"}) TF_RETURN_IF_ERROR(RequireRank(c, name, 0));
  return absl::OkStatus();
}

absl::Status EndNoiseWindowShapes(InferenceContext* c) {
  TF_RETURN_IF_ERROR(RequireOneVariableEach(c, {"statistics"}));
  TF_RETURN_IF_ERROR(RequireRank(c, "window", 1));
  for (const char* name : {"shares", "scale", "applies", "steps", "decay"}) {
    TF_RETURN_IF_ERROR(RequireRank(c, name, 0));
  }
  return absl::OkStatus();
}

REGISTER_OP("AccumOps>AddNoiseGroup")
    .Input("window: N * resource")
    .Input("norms: double")
    .Input("share: T")
    .Input("starts: bool")
    .Attr("N: int >= 0")
    .Attr("T: {float, double}")
    .SetIsStateful()
    .SetShapeFn(AddNoiseGroupShapes)
    .Doc(R"doc(
Adds what a micro-batch tells of the gradient's noise to what is known of its window, in place.

window: One variable: double, of 4 values. Shares times squared norms of gradients, micro-batches with a share, the
  squared norm of the sums, and the sum of all shares.
norms: The squared norms of each gradient, and of each sum with it, as AccumOps>Accumulate reports them.
share: What the micro-batch counts for.
starts: Whether it is the first of its window.
)doc");

REGISTER_OP("AccumOps>EndNoiseWindow")
    .Input("statistics: N * resource")
    .Input("window: double")
    .Input("shares: T")
    .Input("scale: double")
    .Input("applies: bool")
    .Input("steps: int64")
    .Input("decay: double")
    .Attr("N: int >= 0")
    .Attr("T: {float, double}")
    .SetIsStateful()
    .SetShapeFn(EndNoiseWindowShapes)
    .Doc(R"doc(
Takes a window that ends into the averages of the gradient's noise, in place.

statistics: Three variables. The averages of the trace, of the square and of 1, double; the norm of the last window's
  gradient, a double scalar; and the numbers of windows and micro-batches, int64.
window: What is known of the window: the value of the variable of AccumOps>AddNoiseGroup.
shares: The sum of its micro-batches' shares.
scale: A factor that its gradients have.
applies: Whether it makes an update.
steps: How many micro-batches it has, in host memory.
decay: What is left of the averages, in host memory.
)doc");

}  // namespace
}  // namespace accumops
