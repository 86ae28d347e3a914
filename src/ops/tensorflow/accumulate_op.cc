// AccumOps>Accumulate: its signature, and the shapes that can be checked when a graph is built.
#include "absl/strings/str_cat.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace accumops {
namespace {

using ::tensorflow::shape_inference::DimensionHandle;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

// The shape of the variable behind input `index`, as far as it is known, and its type.
ShapeHandle VariableShape(InferenceContext* c, int index, tensorflow::DataType* dtype) {
  const auto* data = c->input_handle_shapes_and_types(index);
  if (data == nullptr || data->empty()) return c->UnknownShape();
  *dtype = data->front().dtype;
  return data->front().shape;
}

absl::Status AccumulateShape(InferenceContext* c) {
  std::vector<ShapeHandle> accumulators, gradients, indices, touched;
  TF_RETURN_IF_ERROR(c->input("accumulators", &accumulators));
  TF_RETURN_IF_ERROR(c->input("gradients", &gradients));
  TF_RETURN_IF_ERROR(c->input("indices", &indices));
  TF_RETURN_IF_ERROR(c->input("touched_rows", &touched));
  const int count = static_cast<int>(accumulators.size());
  const int sparse = static_cast<int>(indices.size());
  if (gradients.size() != accumulators.size() || sparse > count ||
      touched.size() > indices.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("Accumulate takes one gradient for each accumulator, at most as many indices, "
                     "and at most as "
                     "many touched rows as indices; got ",
                     count, " accumulators, ", gradients.size(), " gradients, ", sparse,
                     " indices and ", touched.size(), " touched rows."));
  }
  for (int i = 0; i < count; ++i) {
    tensorflow::DataType dtype;
    const ShapeHandle variable = VariableShape(c, i, &dtype);
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
  const int scalars = 2 * count + sparse + static_cast<int>(touched.size());
  ShapeHandle unused;
  for (int i = scalars; i < c->num_inputs(); ++i) {
    TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 0, &unused));
  }
  std::vector<tensorflow::DataType> finite;
  TF_RETURN_IF_ERROR(c->GetAttr("check_finite", &finite));
  for (int i = 0; i < c->num_outputs(); ++i) {
    c->set_output(i,
                  i < static_cast<int>(finite.size()) ? c->Scalar() : c->Matrix(2, count - sparse));
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
    .Output("all_finite: check_finite")
    .Output("norms: squared_norms")
    .Attr("N: int >= 0")
    .Attr("M: int >= 0")
    .Attr("R: int >= 0")
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
all_finite: With check_finite=[bool], whether every gradient was finite.
norms: With squared_norms=[double], the sums of squares of the gradients, as they are given, and of the accumulators, as the
  op leaves them: of shape [2, N - len(indices)], for those that receive no rows.
)doc");

}  // namespace
}  // namespace accumops
