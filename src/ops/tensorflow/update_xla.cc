// AccumOps>Update and AccumOps>SquaredNorms lowered to XLA, for functions with jit_compile=True.
#include <vector>

#include "absl/strings/str_cat.h"
#include "input_checks.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "update_attributes.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla_support.h"
#include "xla_variable_list.h"

namespace accumops {
namespace {

// The new values of a variable and of its slots.
struct Step {
  xla::XlaOp value;
  std::vector<xla::XlaOp> slots;
};

class UpdateXlaOp : public XlaOpKernel {
 public:
  explicit UpdateXlaOp(OpKernelConstruction* construction) : XlaOpKernel(construction) {
    OP_REQUIRES_OK(construction, attributes_.Read(*construction));
  }

  void Compile(XlaOpKernelContext* ctx) override {
    for (const char* name : {"rate", "decay", "weight", "overwrite", "applies"}) {
      OP_REQUIRES_OK(ctx, RequireScalar(ctx, name));
    }
    xla::XlaOp rate = ctx->Input("rate");
    if (attributes_.corrects_rate) {
      OP_REQUIRES_OK(ctx, RequireScalar(ctx, "iterations"));
      rate = Corrected(ctx, rate);
    }
    OP_REQUIRES_OK(ctx, CheckScales(InputTensorShape(ctx, "scales"), attributes_.count));
    xla::XlaOp updates;
    OP_REQUIRES_OK(ctx, ReadOptionalFlag(ctx, "only_if", &updates));
    updates = xla::And(updates, ctx->Input("applies"));
    XlaVariableList variables(ctx);
    OP_REQUIRES_OK(ctx, variables.Add({"variables", "slots", "accumulators", "touched_rows"}));
    OP_REQUIRES_OK(ctx, CheckUpdate(variables, attributes_));
    // Every input is read and checked before the first variable is assigned.
    std::vector<Step> steps;
    for (int i = 0; i < attributes_.count; ++i) {
      Step step;
      OP_REQUIRES_OK(ctx, MakeStep(ctx, variables, updates, rate, i, &step));
      steps.push_back(step);
    }
    for (int i = 0; i < attributes_.count; ++i) {
      const Step& step = steps[static_cast<std::size_t>(i)];
      OP_REQUIRES_OK(ctx, variables.Assign(static_cast<std::size_t>(i), step.value));
      for (std::size_t s = 0; s < step.slots.size(); ++s) {
        OP_REQUIRES_OK(ctx, variables.Assign(Slot(s, i), step.slots[s]));
      }
    }
  }

 private:
  // The positions among the variables, and the input of a latest gradient.
  std::size_t Slot(std::size_t slot, int i) const {
    return (slot + 1) * static_cast<std::size_t>(attributes_.count) + static_cast<std::size_t>(i);
  }
  std::size_t Accumulator(int i) const {
    return static_cast<std::size_t>(attributes_.count + attributes_.slots + i);
  }
  int LatestInput(int i) const {
    return static_cast<int>(Accumulator(attributes_.accumulators) + attributes_.rows_of.size()) + i;
  }

  // The rate, corrected for the bias of Adam's slots. The powers are as in update_rate.h.
  xla::XlaOp Corrected(XlaOpKernelContext* ctx, xla::XlaOp rate) const {
    const xla::XlaOp step = xla::Add(xla::ConvertElementType(ctx->Input("iterations"), xla::F64),
                                     xla::ConstantR0<double>(ctx->builder(), 1));
    const auto bias = [&](float beta) {
      const xla::XlaOp base = xla::ConstantR0<double>(ctx->builder(), static_cast<double>(beta));
      return xla::Sub(Constant(ctx, 1), xla::ConvertElementType(xla::Pow(base, step), xla::F32));
    };
    const UpdateSettings& settings = attributes_.settings;
    return xla::Div(xla::Mul(rate, xla::Sqrt(bias(settings.beta_2))), bias(settings.beta_1));
  }

  absl::Status Gradient(XlaOpKernelContext* ctx, const XlaVariableList& variables, int i,
                        xla::XlaOp* gradient) const {
    const TensorShape& shape = variables.shape(static_cast<std::size_t>(i));
    xla::XlaBuilder* builder = ctx->builder();
    const xla::XlaOp zeros = xla::Broadcast(xla::Zero(builder, xla::F32), shape.dim_sizes());
    xla::XlaOp sum = zeros;
    if (attributes_.accumulators > 0) {
      xla::XlaOp accumulator;
      TF_RETURN_IF_ERROR(variables.Read(Accumulator(i), &accumulator));
      // Not a product: what is overwritten may hold NaN.
      sum = xla::Select(xla::Broadcast(ctx->Input("overwrite"), shape.dim_sizes()), zeros,
                        accumulator);
    }
    if (attributes_.has_latest) {
      const TensorShape given =
          InputTensorShape(ctx, LatestInput(i), absl::StrCat("latest[", i, "]"));
      TF_RETURN_IF_ERROR(CheckLatest(variables, static_cast<std::size_t>(i), given));
      const xla::XlaOp latest = xla::ConvertElementType(ctx->Input(LatestInput(i)), xla::F32);
      const xla::XlaOp weight = ctx->Input("weight");
      const xla::XlaOp product = xla::Mul(weight, latest);
      // Not a product with 0: what does not count may hold NaN.
      const xla::XlaOp counts = xla::Ne(weight, xla::Zero(builder, xla::F32));
      sum = xla::Select(xla::Broadcast(counts, shape.dim_sizes()),
                        attributes_.accumulators > 0 ? xla::Add(sum, product) : product, sum);
    }
    xla::XlaOp scale = ctx->Input("scales");
    if (InputTensorShape(ctx, "scales").dims() == 1) {
      scale = xla::Reshape(xla::SliceInDim(scale, i, i + 1, 1, 0), {});
    }
    *gradient = xla::Mul(scale, sum);
    if (attributes_.settings.clip > 0) {
      const xla::XlaOp clip =
          xla::Broadcast(Constant(ctx, attributes_.settings.clip), shape.dim_sizes());
      // XLA's own minimum and maximum may lose NaN on a CPU.
      *gradient = xla::Select(xla::Gt(*gradient, clip), clip, *gradient);
      *gradient = xla::Select(xla::Lt(*gradient, xla::Neg(clip)), xla::Neg(clip), *gradient);
    }
    return absl::OkStatus();
  }

  static xla::XlaOp Constant(XlaOpKernelContext* ctx, float value) {
    return xla::ConstantR0<float>(ctx->builder(), value);
  }

  absl::Status MakeStep(XlaOpKernelContext* ctx, const XlaVariableList& variables,
                        xla::XlaOp updates, xla::XlaOp rate, int i, Step* step) const {
    const auto index = static_cast<std::size_t>(i);
    const TensorShape& shape = variables.shape(index);
    xla::XlaOp value, gradient;
    TF_RETURN_IF_ERROR(variables.Read(index, &value));
    TF_RETURN_IF_ERROR(Gradient(ctx, variables, i, &gradient));
    std::vector<xla::XlaOp> slots(SlotsOf(attributes_.settings.rule));
    for (std::size_t s = 0; s < slots.size(); ++s) {
      TF_RETURN_IF_ERROR(variables.Read(Slot(s, i), &slots[s]));
    }
    xla::XlaOp x = value;
    if (attributes_.decays[index]) {
      x = xla::Sub(x, xla::Mul(x, ctx->Input("decay")));
    }
    *step = Apply(ctx, x, gradient, slots, rate);
    // Whether each value is written: all alike, or by the flags of its row. XLA writes all of them.
    xla::XlaOp written = xla::Broadcast(updates, shape.dim_sizes());
    for (std::size_t k = 0; k < attributes_.rows_of.size(); ++k) {
      if (attributes_.rows_of[k] != i) continue;
      xla::XlaOp flags;
      TF_RETURN_IF_ERROR(variables.Read(Accumulator(attributes_.accumulators) + k, &flags));
      written = xla::And(written, xla::BroadcastInDim(flags, shape.dim_sizes(), {0}));
    }
    step->value = xla::Select(written, step->value, value);
    for (std::size_t s = 0; s < slots.size(); ++s) {
      step->slots[s] = xla::Select(written, step->slots[s], slots[s]);
    }
    return absl::OkStatus();
  }

  Step Apply(XlaOpKernelContext* ctx, xla::XlaOp x, xla::XlaOp g,
             const std::vector<xla::XlaOp>& slots, xla::XlaOp rate) const {
    const UpdateSettings& settings = attributes_.settings;
    const xla::XlaOp beta_1 = Constant(ctx, settings.beta_1);
    switch (settings.rule) {
      case UpdateRule::kSgd:
        return {xla::Sub(x, xla::Mul(rate, g)), {}};
      case UpdateRule::kMomentum:
      case UpdateRule::kNesterov: {
        const xla::XlaOp step = xla::Mul(rate, g);
        const xla::XlaOp m = xla::Sub(xla::Mul(slots[0], beta_1), step);
        const bool nesterov = settings.rule == UpdateRule::kNesterov;
        return {xla::Add(x, nesterov ? xla::Sub(xla::Mul(m, beta_1), step) : m), {m}};
      }
      case UpdateRule::kAdam:
      case UpdateRule::kAmsgrad: {
        const auto average = [&](xla::XlaOp old, xla::XlaOp value, float share) {
          return xla::Add(old, xla::Mul(xla::Sub(value, old), Constant(ctx, share)));
        };
        Step step;
        step.slots = {average(slots[0], g, settings.new_1),
                      average(slots[1], xla::Mul(g, g), settings.new_2)};
        xla::XlaOp under = step.slots[1];
        if (settings.rule == UpdateRule::kAmsgrad) {
          const xla::XlaOp w = slots[2];
          under = xla::Select(xla::Or(xla::Gt(w, under), xla::Ne(w, w)), w, under);
          step.slots.push_back(under);
        }
        step.value =
            xla::Sub(x, xla::Div(xla::Mul(step.slots[0], rate),
                                 xla::Add(xla::Sqrt(under), Constant(ctx, settings.epsilon))));
        return step;
      }
      case UpdateRule::kLion: {
        const xla::XlaOp direction =
            xla::Add(xla::Mul(slots[0], beta_1), xla::Mul(g, Constant(ctx, settings.new_1)));
        const xla::XlaOp m = xla::Add(xla::Mul(slots[0], Constant(ctx, settings.beta_2)),
                                      xla::Mul(g, Constant(ctx, settings.new_2)));
        return {xla::Sub(x, xla::Mul(rate, xla::Sign(direction))), {m}};
      }
    }
    return {};
  }

  UpdateAttributes attributes_;
};

class SquaredNormsXlaOp : public XlaOpKernel {
 public:
  using XlaOpKernel::XlaOpKernel;

  void Compile(XlaOpKernelContext* ctx) override {
    xla::XlaBuilder* builder = ctx->builder();
    std::vector<xla::XlaOp> sums;
    for (int i = 0; i < ctx->num_inputs(); ++i) sums.push_back(SquaredNorm(ctx->Input(i)));
    ctx->SetOutput(0, sums.empty() ? xla::Broadcast(xla::Zero(builder, xla::F64), {0})
                                   : xla::ConcatInDim(builder, sums, 0));
  }
};

// Straight to the compilation devices: see accumulate_xla.cc.
REGISTER_KERNEL_BUILDER(Name("AccumOps>Update").Device(tensorflow::DEVICE_CPU_XLA_JIT),
                        UpdateXlaOp);
REGISTER_KERNEL_BUILDER(Name("AccumOps>Update").Device(tensorflow::DEVICE_GPU_XLA_JIT),
                        UpdateXlaOp);
REGISTER_KERNEL_BUILDER(Name("AccumOps>SquaredNorms").Device(tensorflow::DEVICE_CPU_XLA_JIT),
                        SquaredNormsXlaOp);
REGISTER_KERNEL_BUILDER(Name("AccumOps>SquaredNorms").Device(tensorflow::DEVICE_GPU_XLA_JIT),
                        SquaredNormsXlaOp);

}  // namespace
}  // namespace accumops
