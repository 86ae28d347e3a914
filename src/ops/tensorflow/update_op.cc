// AccumOps>Update and AccumOps>SquaredNorms: their signatures, and the shapes that can be checked
// when a graph is built.
#include "absl/strings/str_cat.h"
#include "shape_support.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "update_attributes.h"

namespace accumops {
namespace {

using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

absl::Status UpdateShapes(InferenceContext* c) {
  UpdateAttributes attributes;
  TF_RETURN_IF_ERROR(attributes.Read(*c));
  TF_RETURN_IF_ERROR(
      RequireOneVariableEach(c, {"variables", "slots", "accumulators", "touched_rows"}));
  const int count = attributes.count;
  // Slots and accumulators, and then the latest gradients, are lists beside the variables.
  const int beside = count + attributes.slots + attributes.accumulators;
  std::vector<ShapeHandle> latest;
  TF_RETURN_IF_ERROR(c->input("latest", &latest));
  const auto check = [&](int i, ShapeHandle shape, const char* what) -> absl::Status {
    ShapeHandle unused;
    const absl::Status status = c->Merge(VariableShape(c, i), shape, &unused);
    if (status.ok()) return status;
    return absl::InvalidArgumentError(
        absl::StrCat(what, " of shape ", c->DebugString(shape), " does not fit variables[", i,
                     "] of shape ", c->DebugString(VariableShape(c, i)), ": ", status.message()));
  };
  for (int i = count; i < beside; ++i) {
    const char* what = i < count + attributes.slots ? "A slot" : "An accumulator";
    TF_RETURN_IF_ERROR(check(i % count, VariableShape(c, i), what));
  }
  for (std::size_t i = 0; i < latest.size(); ++i) {
    TF_RETURN_IF_ERROR(check(static_cast<int>(i), latest[i], "A latest gradient"));
  }
  ShapeHandle unused;
  for (const char* name :
       {"rate", "iterations", "decay", "weight", "overwrite", "applies", "only_if"}) {
    std::vector<ShapeHandle> shapes;
    TF_RETURN_IF_ERROR(c->input(name, &shapes));
    for (const ShapeHandle shape : shapes) TF_RETURN_IF_ERROR(c->WithRank(shape, 0, &unused));
  }
  std::vector<ShapeHandle> scales;
  TF_RETURN_IF_ERROR(c->input("scales", &scales));
  return c->WithRankAtMost(scales[0], 1, &unused);
}

REGISTER_OP("AccumOps>Update")
    .Input("variables: N * resource")
    .Input("slots: S * resource")
    .Input("accumulators: A * resource")
    .Input("touched_rows: R * resource")
    .Input("latest: latest_types")
    .Input("scales: float")
    .Input("rate: float")
    .Input("iterations: I * int64")
    .Input("decay: float")
    .Input("weight: float")
    .Input("overwrite: bool")
    .Input("applies: bool")
    .Input("only_if: C * bool")
    .Attr("N: int >= 0")
    .Attr("S: int >= 0")
    .Attr("A: int >= 0")
    .Attr("R: int >= 0")
    .Attr("I: int >= 0")
    .Attr("C: int >= 0")
    .Attr("latest_types: list({half, bfloat16, float}) >= 0")
    .Attr("rule: {'sgd', 'momentum', 'nesterov', 'adam', 'amsgrad', 'lion'}")
    .Attr("rows_of: list(int) >= 0 = []")
    .Attr("decays: list(bool) >= 0")
    .Attr("beta_1: float = 0.0")
    .Attr("beta_2: float = 0.0")
    .Attr("new_1: float = 0.0")
    .Attr("new_2: float = 0.0")
    .Attr("epsilon: float = 0.0")
    .Attr("clip: float = 0.0")
    .SetIsStateful()
    .SetShapeFn(UpdateShapes)
    .Doc(R"doc(
Makes an optimizer's step in place, for all variables, with gradients that are
clamp(scale * ((overwrite ? 0 : accumulator) + weight * latest), -clip, clip).

variables: float, each once.
slots: The rule's slots: the first slot of every variable, then the second of every one, and the third.
accumulators: One for each variable, or none. They are not written.
touched_rows: Bool variables with a flag for each row of the variables in rows_of: other rows stay as they are.
latest: Gradients that the accumulators do not hold yet: one for each variable, or none.
scales: A factor for all gradients, or one for each variable.
rate: The learning rate; for Adam with the bias corrections, if there are no iterations.
iterations: None, or one number of updates before this one, by which Adam's rate is corrected.
decay: The share of a value that is subtracted from it before the step, where the variable decays.
weight: A factor for the latest gradients. With 0 they count as zero, whatever they hold.
overwrite: Whether accumulators count as zero.
applies: Whether the step is made. If not, nothing is written.
only_if: None, or one flag, on the host: where it is false, no variable is read or written.
rows_of: Which variables have flags.
decays: For each variable, whether it decays.
beta_1: The momentum, or Adam's and Lion's first decay rate.
beta_2: Adam's and Lion's second decay rate.
new_1: 1 - beta_1.
new_2: 1 - beta_2.
epsilon: A summand of Adam's denominator.
clip: The largest magnitude of a gradient's values, or 0.
)doc");

REGISTER_OP("AccumOps>SquaredNorms")
    .Input("values: types")
    .Output("sums: double")
    .Attr("types: list({half, bfloat16, float, double}) >= 0")
    .SetShapeFn([](InferenceContext* c) {
      c->set_output(0, c->Vector(c->num_inputs()));
      return absl::OkStatus();
    })
    .Doc(R"doc(
The sum of squares of each tensor, in double: finite where all of its values are.
)doc");

}  // namespace
}  // namespace accumops
