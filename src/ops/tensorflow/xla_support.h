// What the XLA kernels share.
#pragma once

#include <limits>
#include <string>

#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/hlo/builder/xla_computation.h"
#include "xla/xla_data.pb.h"

namespace accumops {

using ::tensorflow::DataType;
using ::tensorflow::DataTypeString;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::TensorShape;
using ::tensorflow::XlaOpKernel;
using ::tensorflow::XlaOpKernelContext;

// Dimensions of a shape, from `first` to before `end`.
struct Dimensions {
  int first = 0;
  int end = std::numeric_limits<int>::max();
};

// The shape of an input that messages call `name`. XLA learns some sizes only when it runs, such as
// that of a boolean mask's result, and has an upper bound of them before. What is written to a
// variable must be known to fit before. So the context gets an error where a size among `known` is
// not known; elsewhere the bound stands for it.
TensorShape InputTensorShape(XlaOpKernelContext* ctx, int input, const std::string& name,
                             Dimensions known = {});
TensorShape InputTensorShape(XlaOpKernelContext* ctx, const char* name, Dimensions known = {});

// Fails unless the input `name` is a scalar. A shape function cannot know that of every input.
absl::Status RequireScalar(XlaOpKernelContext* ctx, const char* name);

// Reads the input `name`, a list of one flag or of none, which counts as true.
absl::Status ReadOptionalFlag(XlaOpKernelContext* ctx, const char* name, xla::XlaOp* flag);

// a + b of scalars, to reduce with.
xla::XlaComputation Sum(xla::PrimitiveType type);

// Whether all values are finite: a scalar.
xla::XlaOp AllFinite(xla::XlaOp values);

// The sum of squares of all values, as one value of float64: of shape [1].
xla::XlaOp SquaredNorm(xla::XlaOp values);

}  // namespace accumops
