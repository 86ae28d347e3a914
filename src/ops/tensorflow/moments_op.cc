// AccumOps>MergeMoments, AccumOps>AddToWindows and AccumOps>EndWindows: their signatures, and the
// shapes that can be checked when a graph is built.
#include "shape_support.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace accumops {
namespace {

using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

absl::Status MergeMomentsShapes(InferenceContext* c) {
  TF_RETURN_IF_ERROR(RequireOneVariableEach(c, {"window", "moving"}));
  std::vector<ShapeHandle> shapes;
  ShapeHandle channels = c->UnknownShapeOfRank(1), unused;
  TF_RETURN_IF_ERROR(c->input("moments", &shapes));
  for (const ShapeHandle& shape : shapes) {
    TF_RETURN_IF_ERROR(c->Merge(shape, channels, &channels));
  }
  TF_RETURN_IF_ERROR(c->input("count", &shapes));
  for (const ShapeHandle& shape : shapes) TF_RETURN_IF_ERROR(c->WithRank(shape, 0, &unused));
  TF_RETURN_IF_ERROR(c->input("momentum", &shapes));
  return c->WithRank(shapes[0], 0, &unused);
}

absl::Status AddToWindowsShapes(InferenceContext* c) {
  TF_RETURN_IF_ERROR(RequireOneVariableEach(c, {"windows"}));
  std::vector<ShapeHandle> counts, moments, applies;
  ShapeHandle unused;
  TF_RETURN_IF_ERROR(c->input("counts", &counts));
  for (const ShapeHandle& shape : counts) TF_RETURN_IF_ERROR(c->WithRank(shape, 0, &unused));
  TF_RETURN_IF_ERROR(c->input("moments", &moments));
  for (const ShapeHandle& shape : moments) TF_RETURN_IF_ERROR(c->WithRank(shape, 1, &unused));
  TF_RETURN_IF_ERROR(c->input("applies", &applies));
  return c->WithRank(applies[0], 0, &unused);
}

absl::Status EndWindowsShapes(InferenceContext* c) {
  TF_RETURN_IF_ERROR(RequireOneVariableEach(c, {"windows", "moving"}));
  std::vector<ShapeHandle> momenta, applies;
  ShapeHandle unused;
  TF_RETURN_IF_ERROR(c->input("momenta", &momenta));
  TF_RETURN_IF_ERROR(c->WithRank(momenta[0], 1, &unused));
  TF_RETURN_IF_ERROR(c->input("applies", &applies));
  return c->WithRank(applies[0], 0, &unused);
}

REGISTER_OP("AccumOps>MergeMoments")
    .Input("window: window_parts * resource")
    .Input("moving: moving_parts * resource")
    .Input("count: batches * int64")
    .Input("moments: batch_parts * U")
    .Input("momentum: double")
    .Attr("window_parts: int >= 0")
    .Attr("moving_parts: int >= 0")
    .Attr("batches: int >= 0")
    .Attr("batch_parts: int >= 0")
    .Attr("U: {float, double} = DT_FLOAT")
    .Attr("only_finite: bool = false")
    .SetIsStateful()
    .SetShapeFn(MergeMomentsShapes)
    .Doc(R"doc(
Merges a batch's moments with those of a window, in place, by Chan's formula; at its end running statistics move.

window: None, or two variables. The first is int64: values of a channel in the window, calls, and how many calls are a
  window. The second is double, of shape [2, channels]: means, and sums of squared distances from them.
moving: None, where the window does not end here, or two float or double variables: running mean and variance.
count: None, or a batch's number of values of a channel. Without a batch, and without a window, this is the end.
moments: None, or a batch's mean, the rest that rounding took from it, and its variance.
momentum: The share of their old values that running statistics keep.
only_finite: Whether a batch with a mean or variance that is not finite counts as one without values.
)doc");

REGISTER_OP("AccumOps>AddToWindows")
    .Input("windows: window_parts * resource")
    .Input("counts: batches * int64")
    .Input("moments: batch_parts * U")
    .Input("applies: bool")
    .Attr("window_parts: int >= 0")
    .Attr("batches: int >= 0")
    .Attr("batch_parts: int >= 0")
    .Attr("U: {float, double} = DT_FLOAT")
    .SetIsStateful()
    .SetShapeFn(AddToWindowsShapes)
    .Doc(R"doc(
Merges batches' moments with those of windows, as AccumOps>MergeMoments does where a window stays open.

windows: The two variables of each window.
counts: For each window a batch's number of values of a channel.
moments: For each window the batch's mean, the rest that rounding took from it, and its variance.
applies: Whether anything is added. If not, nothing is written.
)doc");

REGISTER_OP("AccumOps>EndWindows")
    .Input("windows: window_parts * resource")
    .Input("moving: moving_parts * resource")
    .Input("momenta: double")
    .Input("applies: bool")
    .Attr("window_parts: int >= 0")
    .Attr("moving_parts: int >= 0")
    .SetIsStateful()
    .SetShapeFn(EndWindowsShapes)
    .Doc(R"doc(
Ends windows of AccumOps>MergeMoments: running statistics move by the moments of each, or the moments are dropped.

windows: The two variables of each window.
moving: None, where moments are dropped, or the two moving statistics of each window.
momenta: For each window, the share of their old values that its running statistics keep; none without `moving`.
applies: Whether the windows end. If not, nothing is written.
)doc");

}  // namespace
}  // namespace accumops
