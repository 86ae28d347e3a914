// AccumOps>Accumulate: its signature, and the shapes that can be checked when a graph is built.
#include "absl/strings/str_cat.h"
#include "accumulate_attributes.h"
#include "shape_support.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace accumops {
namespace {

using ::tensorflow::shape_inference::DimensionHandle;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

absl::Status AccumulateShape(InferenceContext* c) {
  std::vector<ShapeHandle> gradients, indices;
  TF_RETURN_IF_ERROR(c->input("gradients", &gradients));
  TF_RETURN_IF_ERROR(c->input("indices", &indices));
  AccumulateAttributes attributes;
  TF_RETURN_IF_ERROR(attributes.Read(*c));
  TF_RETURN_IF_ERROR(RequireOneVariableEach(c, {"accumulators", "touched_rows"}));
  const int count = static_cast<int>(attributes.count);
  const int sparse = static_cast<int>(attributes.sparse);
  for (int i = 0; i < count; ++i) {
    const ShapeHandle variable = VariableShape(c, i);
    ShapeHandle merged;
    absl::Status status;
    if (i < count - sparse) {
      status = c->Merge(variable, gradients[i], &merged);
    } else {
      const ShapeHandle rows = indices[i - (count - sparse)];
      ShapeHandle vector, values, variable_row, values_row;
      DimensionHandle length;
      TF_RETURN_IF_ERROR(c->WithRank(rows, 1, &vector));
      TF_RETURN_IF_ERROR(c->WithRankAtLeast(gradients[i], 1, &values));
      status = c->Merge(c->Vector(c->Dim(values, 0)), vector, &merged);
      if (status.ok() && c->RankKnown(variable) && c->Rank(variable) > 0) {
        TF_RETURN_IF_ERROR(c->Subshape(variable, 1, &variable_row));
        TF_RETURN_IF_ERROR(c->Subshape(values, 1, &values_row));
        status = c->Merge(variable_row, values_row, &merged);
      }
    }
    if (!status.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("gradients[", i, "] of shape ", c->DebugString(gradients[i]),
                       " does not fit accumulators[", i, "] of shape ", c->DebugString(variable),
                       ": ", status.message()));
    }
  }
  const int scalars = 2 * count + sparse + static_cast<int>(attributes.tracked);
  ShapeHandle unused;
  for (int i = scalars; i < c->num_inputs(); ++i) {
    TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 0, &unused));
  }
  if (attributes.check_finite) c->set_output(0, c->Scalar());
  if (attributes.squared_norms) {
    c->set_output(c->num_outputs() - 1, c->Matrix(2, count - sparse));
  }
  return absl::OkStatus();
}

REGISTER_OP("AccumOps>Accumulate")
    .Input("accumulators: N * resource")
    .Input("gradients: gradient_types")
    .Input("indices: index_types")
    .Input("touched_rows: M * resource")
    .Input("scale: scale_type")
    .Input("overwrite: bool")
    .Input("norms_if: R * bool")
    .Input("only_if: C * bool")
    .Output("all_finite: check_finite")
    .Output("norms: squared_norms")
    .Attr("N: int >= 0")
    .Attr("M: int >= 0")
    .Attr("R: int >= 0")
    .Attr("C: int >= 0")
    .Attr("gradient_types: list({half, bfloat16, float, double}) >= 0")
    .Attr("index_types: list({int32, int64}) >= 0")
    .Attr("scale_type: {float, double}")
    // Lists and not numbers: TensorFlow would make room for any number of outputs.
    .Attr("check_finite: list({bool}) >= 0 = []")
    .Attr("squared_norms: list({double}) >= 0 = []")
    .SetIsStateful()
    .SetShapeFn(AccumulateShape)
    .Doc(R"doc(
Adds scaled gradients to accumulators in place: acc <- (overwrite ? 0 : acc) + scale * gradient.

accumulators: Variables, float32 or float64, each once. The last len(indices) of them receive rows.
gradients: One tensor for each accumulator, of its shape and no wider type; for the last len(indices) of them the
  values of rows, of shape [rows given, ...].
indices: For each sparse gradient, the row of each of its values. Duplicates add up in their order.
touched_rows: For the last of the sparse gradients, a bool variable each, with a flag for each row of the accumulator.
  The op sets the flags of the rows it adds to (none where scale is 0) and, where overwrite is true, clears only the rows that were flagged.
scale: A factor for every gradient. With 0 nothing is added, whatever the gradients hold.
overwrite: Whether to start from zero instead of what the accumulators hold.
norms_if: None, or one flag, on the host: where it is false, the norms are NaN and cost nothing.
only_if: None, or one flag, on the host: where it is false, no variable is read or written, the norms are NaN and
  all_finite is true.
all_finite: With check_finite=[bool], whether every gradient was finite.
norms: With squared_norms=[double], the sums of squares of the gradients, as they are given, and of the accumulators, as the
  op leaves them: of shape [2, N - len(indices)], for those that receive no rows.
)doc");

}  // namespace
}  // namespace accumops
