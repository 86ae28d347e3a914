// What the ops' shape functions share.
#pragma once

#include <initializer_list>

#include "tensorflow/core/framework/shape_inference.h"

namespace accumops {

// The shape of the variable behind input `index`, as far as it is known.
tensorflow::shape_inference::ShapeHandle VariableShape(
    tensorflow::shape_inference::InferenceContext* c, int index);

// Checks that no input of these lists is known to hold several variables, or none. TensorFlow
// itself gives a function that XLA compiles the first of several, before any kernel sees them.
absl::Status RequireOneVariableEach(tensorflow::shape_inference::InferenceContext* c,
                                    std::initializer_list<const char*> lists);

}  // namespace accumops
