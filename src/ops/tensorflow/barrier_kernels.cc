// AccumOps>Barrier on the CPU and on the GPU: outputs are their inputs. TensorFlow's graph
// optimizer knows nothing of this op, and leaves it where it is.
#include "tensorflow/core/framework/op_kernel.h"

namespace accumops {
namespace {

class BarrierOp : public tensorflow::OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(tensorflow::OpKernelContext* ctx) override {
    for (int i = 0; i < ctx->num_outputs(); ++i) ctx->set_output(i, ctx->input(i));
  }

  bool IsExpensive() override { return false; }
};

REGISTER_KERNEL_BUILDER(Name("AccumOps>Barrier").Device(tensorflow::DEVICE_CPU), BarrierOp);
#if defined(ACCUMOPS_CUDA)
REGISTER_KERNEL_BUILDER(Name("AccumOps>Barrier").Device(tensorflow::DEVICE_GPU), BarrierOp);
#endif

}  // namespace
}  // namespace accumops
