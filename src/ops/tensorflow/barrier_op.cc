// AccumOps>Barrier: its signature and shapes.
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace accumops {
namespace {

using ::tensorflow::shape_inference::InferenceContext;

absl::Status BarrierShapes(InferenceContext* c) {
  for (int i = 0; i < c->num_outputs(); ++i) {
    c->set_output(i, c->input(i));
    const auto* handle = c->input_handle_shapes_and_types(i);
    if (handle != nullptr) c->set_output_handle_shapes_and_types(i, *handle);
  }
  return absl::OkStatus();
}

REGISTER_OP("AccumOps>Barrier")
    .Input("tensors: T")
    .Input("after: U")
    .Output("same_tensors: T")
    .Attr("T: list(type) >= 1")
    .Attr("U: list(type) >= 0")
    .SetShapeFn(BarrierShapes)
    .Doc(R"doc(
Returns the same tensors, once all inputs are there. No compiler takes them for the same.

What is computed from the outputs is therefore computed again, and not before the inputs in `after` are known.

tensors: Any tensors.
after: Tensors to wait for.
same_tensors: The tensors. Nothing is copied.
)doc");

}  // namespace
}  // namespace accumops
