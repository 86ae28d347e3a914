// What the XLA kernels share.
#pragma once

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

// The shape of an input, with upper bounds of sizes that XLA learns only when it runs. Where XLA
// does not know the shape, the context gets an error.
TensorShape InputTensorShape(XlaOpKernelContext* ctx, int input);
TensorShape InputTensorShape(XlaOpKernelContext* ctx, const char* name);

// Fails unless the input `name` is a scalar. A shape function cannot know that of every input.
absl::Status RequireScalar(XlaOpKernelContext* ctx, const char* name);

// a + b of scalars, to reduce with.
xla::XlaComputation Sum(xla::PrimitiveType type);

// The sum of squares of all values, as one value of float64: of shape [1].
xla::XlaOp SquaredNorm(xla::XlaOp values);

}  // namespace accumops
