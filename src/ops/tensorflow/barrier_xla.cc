// AccumOps>Barrier lowered to XLA, for functions with jit_compile=True.
//
// XLA's own barrier holds on a GPU. On a CPU, XLA removes it (cse_barrier_expander) and looks for
// common subexpressions once more after that, so recomputation behind it disappears. There, the
// barrier is a call of a function that XLA does not know. It does nothing, and its results are in
// the buffers of its operands.
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/layout_util.h"
#include "xla/service/custom_call_target_registry.h"
#include "xla/shape_util.h"
#include "xla_support.h"

namespace accumops {
namespace {

constexpr char kCall[] = "accumops_barrier";

void DoNothing(void*, const void**) {}

const bool kRegistered = [] {
  xla::CustomCallTargetRegistry::Global()->Register(kCall, reinterpret_cast<void*>(&DoNothing),
                                                    "Host");
  return true;
}();

// Returns the first `count` of the inputs, as a tuple.
xla::XlaOp CallOnHost(xla::XlaBuilder* builder, const std::vector<xla::XlaOp>& inputs,
                      std::vector<xla::Shape> shapes, int count) {
  // Operand and result share a buffer, so they need the same layout.
  for (xla::Shape& shape : shapes) xla::LayoutUtil::SetToDefaultLayout(&shape);
  const std::vector<xla::Shape> results(shapes.begin(), shapes.begin() + count);
  std::vector<std::pair<xla::ShapeIndex, std::pair<std::int64_t, xla::ShapeIndex>>> aliases(count);
  for (int i = 0; i < count; ++i) {
    aliases[i].first.push_back(i);
    aliases[i].second.first = i;
  }
  return xla::CustomCallWithLayout(builder, kCall, inputs, xla::ShapeUtil::MakeTupleShape(results),
                                   shapes, "", false, aliases);
}

template <bool kOnHost>
class BarrierXlaOp : public XlaOpKernel {
 public:
  using XlaOpKernel::XlaOpKernel;

  void Compile(XlaOpKernelContext* ctx) override {
    std::vector<xla::XlaOp> inputs;
    std::vector<xla::Shape> shapes;
    for (int i = 0; i < ctx->num_inputs(); ++i) {
      const DataType dtype = ctx->input_type(i);
      OP_REQUIRES(ctx, dtype != tensorflow::DT_RESOURCE && dtype != tensorflow::DT_VARIANT,
                  absl::InvalidArgumentError(absl::StrCat("Input ", i, " of Barrier is a ",
                                                          DataTypeString(dtype),
                                                          ", and XLA takes tensors only.")));
      const auto shape = ctx->InputXlaShape(i);
      OP_REQUIRES_OK(ctx, shape.status());
      inputs.push_back(ctx->Input(i));
      shapes.push_back(*shape);
    }
    const xla::XlaOp results =
        kOnHost ? CallOnHost(ctx->builder(), inputs, std::move(shapes), ctx->num_outputs())
                : xla::OptimizationBarrier(xla::Tuple(ctx->builder(), inputs));
    for (int i = 0; i < ctx->num_outputs(); ++i) {
      ctx->SetOutput(i, xla::GetTupleElement(results, i));
    }
  }
};

// Straight to the compilation devices, as accumulate_xla.cc explains.
REGISTER_KERNEL_BUILDER(Name("AccumOps>Barrier").Device(tensorflow::DEVICE_CPU_XLA_JIT),
                        BarrierXlaOp<true>);
REGISTER_KERNEL_BUILDER(Name("AccumOps>Barrier").Device(tensorflow::DEVICE_GPU_XLA_JIT),
                        BarrierXlaOp<false>);

}  // namespace
}  // namespace accumops
