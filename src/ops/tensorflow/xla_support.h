// What the XLA kernels share.
#pragma once

#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "xla/hlo/builder/xla_computation.h"
#include "xla/xla_data.pb.h"

namespace accumops {

// The shape of an input that XLA knows; where it does not, the context fails.
tensorflow::TensorShape InputTensorShape(tensorflow::XlaOpKernelContext* ctx, int input);

// a + b of scalars, to reduce with.
xla::XlaComputation Sum(xla::PrimitiveType type);

}  // namespace accumops
