#include "shape_support.h"

#include <vector>

#include "input_checks.h"

namespace accumops {

using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

ShapeHandle VariableShape(InferenceContext* c, int index) {
  const auto* data = c->input_handle_shapes_and_types(index);
  return data == nullptr || data->empty() ? c->UnknownShape() : data->front().shape;
}

absl::Status RequireOneVariableEach(InferenceContext* c, std::initializer_list<const char*> lists) {
  for (const char* list : lists) {
    std::vector<ShapeHandle> handles;
    TF_RETURN_IF_ERROR(c->input(list, &handles));
    for (std::size_t i = 0; i < handles.size(); ++i) {
      const auto elements = c->NumElements(handles[i]);
      if (c->ValueKnown(elements) && c->Value(elements) != 1) {
        return NotOneVariable(list, static_cast<int>(i), c->DebugString(handles[i]));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace accumops
