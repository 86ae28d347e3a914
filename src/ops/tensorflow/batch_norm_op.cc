// AccumOps>BatchNorm and its relatives: their signatures, and the shapes that can be checked when a
// graph is built.
#include "absl/strings/str_cat.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace accumops {
namespace {

using ::tensorflow::shape_inference::DimensionHandle;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

// Checks that inputs [first, last) are vectors with a value for each channel of input `x`, which
// may refine the number of channels.
absl::Status ChannelShapes(InferenceContext* c, int x, int first, int last, ShapeHandle* channels) {
  *channels = c->UnknownShapeOfRank(1);
  if (c->RankKnown(c->input(x))) {
    int axis;
    TF_RETURN_IF_ERROR(c->GetAttr("axis", &axis));
    const int rank = c->Rank(c->input(x));
    if (axis < 0 || axis >= rank) {
      return absl::InvalidArgumentError(
          absl::StrCat("axis is ", axis, ", but x has shape ", c->DebugString(c->input(x)), "."));
    }
    *channels = c->Vector(c->Dim(c->input(x), axis));
  }
  for (int i = first; i < last; ++i) {
    TF_RETURN_IF_ERROR(c->Merge(c->input(i), *channels, channels));
  }
  return absl::OkStatus();
}

absl::Status BatchNormShapes(InferenceContext* c) {
  ShapeHandle channels;
  TF_RETURN_IF_ERROR(ChannelShapes(c, 0, 1, 3, &channels));
  c->set_output(0, c->input(0));
  for (int i = 1; i < 5; ++i) c->set_output(i, channels);
  c->set_output(5, c->Scalar());
  return absl::OkStatus();
}

absl::Status BatchNormGradShapes(InferenceContext* c) {
  ShapeHandle channels, x;
  TF_RETURN_IF_ERROR(c->Merge(c->input(0), c->input(1), &x));
  TF_RETURN_IF_ERROR(ChannelShapes(c, 1, 2, 6, &channels));
  c->set_output(0, x);
  c->set_output(1, channels);
  c->set_output(2, channels);
  return absl::OkStatus();
}

absl::Status BatchNormInferenceShapes(InferenceContext* c) {
  ShapeHandle channels;
  TF_RETURN_IF_ERROR(ChannelShapes(c, 0, 1, 5, &channels));
  c->set_output(0, c->input(0));
  return absl::OkStatus();
}

REGISTER_OP("AccumOps>BatchNorm")
    .Input("x: T")
    .Input("gamma: U")
    .Input("beta: U")
    .Input("mask: mask_count * bool")
    .Output("y: T")
    .Output("mean: U")
    .Output("rest: U")
    .Output("variance: U")
    .Output("inverse: U")
    .Output("count: int64")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("U: {float, double}")
    .Attr("axis: int")
    .Attr("epsilon: float")
    .Attr("mask_count: int >= 0 = 0")
    .SetShapeFn(BatchNormShapes)
    .Doc(R"doc(
Normalizes x by its own moments: y = (x - mean) * inverse * gamma + beta.

x: An array of rank 1 or more.
gamma: A factor for each channel, float, or double for double data.
beta: A summand for each channel.
mask: At most one, of x's shape without the channels, which must be last then: rows where it is false do not count.
y: An array of x's shape and type.
mean: Each channel's mean, rounded; mean + rest is the mean.
rest: What rounding took from the mean.
variance: Each channel's biased variance.
inverse: 1 / sqrt(variance + epsilon).
count: How many values of a channel there are, without masked ones.
axis: The axis of the channels, from 0 on.
epsilon: A summand of the variance.
)doc");

REGISTER_OP("AccumOps>BatchNormGrad")
    .Input("dy: T")
    .Input("x: T")
    .Input("gamma: U")
    .Input("mean: U")
    .Input("rest: U")
    .Input("inverse: U")
    .Input("count: int64")
    .Input("mask: mask_count * bool")
    .Output("dx: T")
    .Output("dgamma: U")
    .Output("dbeta: U")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("U: {float, double}")
    .Attr("axis: int")
    .Attr("mask_count: int >= 0 = 0")
    .SetShapeFn(BatchNormGradShapes)
    .Doc(R"doc(
The gradient of BatchNorm; with count = 0, of BatchNormInference.
)doc");

REGISTER_OP("AccumOps>BatchNormInference")
    .Input("x: T")
    .Input("gamma: U")
    .Input("beta: U")
    .Input("mean: U")
    .Input("variance: U")
    .Output("y: T")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("U: {float, double}")
    .Attr("axis: int")
    .Attr("epsilon: float")
    .SetShapeFn(BatchNormInferenceShapes)
    .Doc(R"doc(
Normalizes x by given moments: y = (x - mean) / sqrt(variance + epsilon) * gamma + beta.
)doc");

}  // namespace
}  // namespace accumops
