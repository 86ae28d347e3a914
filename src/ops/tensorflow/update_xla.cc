// AccumOps>Update and AccumOps>SquaredNorms lowered to XLA, for functions with jit_compile=True.
#include <vector>

#include "absl/strings/str_cat.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "update_attributes.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla_support.h"

namespace accumops {
namespace {

constexpr DataType kFloat = tensorflow::DT_FLOAT;

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
    int scalar = LatestInput(attributes_.has_latest ? attributes_.count : 0) + 1;  // after `scales`
    for (const char* name : {"rate", "decay", "weight", "overwrite", "applies"}) {
      OP_REQUIRES_OK(ctx, RequireScalarInput(ctx, scalar++, name));
    }
    // Every input is read and checked before the first variable is assigned.
    std::vector<Step> steps;
    for (int i = 0; i < attributes_.count; ++i) {
      Step step;
      OP_REQUIRES_OK(ctx, MakeStep(ctx, i, &step));
      steps.push_back(step);
    }
    for (int i = 0; i < attributes_.count; ++i) {
      const Step& step = steps[static_cast<std::size_t>(i)];
      OP_REQUIRES_OK(ctx, ctx->AssignVariable(i, kFloat, step.value));
      for (std::size_t s = 0; s < step.slots.size(); ++s) {
        OP_REQUIRES_OK(ctx, ctx->AssignVariable(SlotInput(s, i), kFloat, step.slots[s]));
      }
    }
  }

 private:
  int SlotInput(std::size_t slot, int i) const {
    return (static_cast<int>(slot) + 1) * attributes_.count + i;
  }
  int AccumulatorInput(int i) const { return attributes_.count + attributes_.slots + i; }

  // The flags' input, or -1 where all rows are updated.
  int FlagsInput(int i) const {
    for (std::size_t k = 0; k < attributes_.rows_of.size(); ++k) {
      if (attributes_.rows_of[k] == i) {
        return AccumulatorInput(attributes_.accumulators) + static_cast<int>(k);
      }
    }
    return -1;
  }
  int LatestInput(int i) const {
    return AccumulatorInput(attributes_.accumulators) +
           static_cast<int>(attributes_.rows_of.size()) + i;
  }

  // Reads a variable, which has to be float, and of `shape` where the shape is `known` already.
  static absl::Status ReadFloat(XlaOpKernelContext* ctx, int input, TensorShape* shape, bool known,
                                xla::XlaOp* value) {
    DataType dtype;
    TensorShape found;
    TF_RETURN_IF_ERROR(ctx->GetVariableTypeAndShape(input, &dtype, &found));
    if (dtype != kFloat || (known && found != *shape)) {
      return absl::InvalidArgumentError(
          absl::StrCat("Input ", input, " of Update is ", DataTypeString(dtype), " of shape ",
                       found.DebugString(), "; it must be float",
                       known ? absl::StrCat(" of shape ", shape->DebugString()) : "", "."));
    }
    *shape = found;
    return ctx->ReadVariableInput(input, dtype, &found, value);
  }

  absl::Status Gradient(XlaOpKernelContext* ctx, int i, TensorShape shape, xla::XlaOp* gradient) {
    xla::XlaBuilder* builder = ctx->builder();
    const xla::XlaOp zeros = xla::Broadcast(xla::Zero(builder, xla::F32), shape.dim_sizes());
    xla::XlaOp sum = zeros;
    if (attributes_.accumulators > 0) {
      xla::XlaOp accumulator;
      TF_RETURN_IF_ERROR(ReadFloat(ctx, AccumulatorInput(i), &shape, true, &accumulator));
      // Not a product: what is overwritten may hold NaN.
      sum = xla::Select(xla::Broadcast(ctx->Input("overwrite"), shape.dim_sizes()), zeros,
                        accumulator);
    }
    if (attributes_.has_latest) {
      const TensorShape given = InputTensorShape(ctx, LatestInput(i));
      if (given != shape) {
        return absl::InvalidArgumentError(absl::StrCat("latest[", i, "] has shape ",
                                                       given.DebugString(), "; variables[", i,
                                                       "] has shape ", shape.DebugString(), "."));
      }
      const xla::XlaOp latest = xla::ConvertElementType(ctx->Input(LatestInput(i)), xla::F32);
      const xla::XlaOp weight = ctx->Input("weight");
      const xla::XlaOp product = xla::Mul(weight, latest);
      // Not a product with 0: what does not count may hold NaN.
      const xla::XlaOp counts = xla::Ne(weight, xla::Zero(builder, xla::F32));
      sum = xla::Select(xla::Broadcast(counts, shape.dim_sizes()),
                        attributes_.accumulators > 0 ? xla::Add(sum, product) : product, sum);
    }
    const int scales_input = LatestInput(attributes_.has_latest ? attributes_.count : 0);
    xla::XlaOp scale = ctx->Input(scales_input);
    const TensorShape scales = InputTensorShape(ctx, scales_input);
    if (scales.dims() == 1) {
      if (scales.dim_size(0) != attributes_.count) {
        return absl::InvalidArgumentError(absl::StrCat("scales has shape ", scales.DebugString(),
                                                       " for ", attributes_.count, " variables."));
      }
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

  absl::Status MakeStep(XlaOpKernelContext* ctx, int i, Step* step) {
    TensorShape shape;
    xla::XlaOp value, gradient;
    TF_RETURN_IF_ERROR(ReadFloat(ctx, i, &shape, false, &value));
    TF_RETURN_IF_ERROR(Gradient(ctx, i, shape, &gradient));
    std::vector<xla::XlaOp> slots(SlotsOf(attributes_.settings.rule));
    for (std::size_t s = 0; s < slots.size(); ++s) {
      TF_RETURN_IF_ERROR(ReadFloat(ctx, SlotInput(s, i), &shape, true, &slots[s]));
    }
    xla::XlaOp x = value;
    if (attributes_.decays[static_cast<std::size_t>(i)]) {
      x = xla::Sub(x, xla::Mul(x, ctx->Input("decay")));
    }
    *step = Apply(ctx, x, gradient, slots);
    // Whether each value is written: all alike, or by the flags of its row. XLA writes all of them.
    xla::XlaOp written = xla::Broadcast(ctx->Input("applies"), shape.dim_sizes());
    TF_RETURN_IF_ERROR(WithTouchedRows(ctx, i, shape, &written));
    step->value = xla::Select(written, step->value, value);
    for (std::size_t s = 0; s < slots.size(); ++s) {
      step->slots[s] = xla::Select(written, step->slots[s], slots[s]);
    }
    return absl::OkStatus();
  }

  // Takes the rows whose flag is false out of what is written.
  absl::Status WithTouchedRows(XlaOpKernelContext* ctx, int i, const TensorShape& shape,
                               xla::XlaOp* written) const {
    const int flags_input = FlagsInput(i);
    if (flags_input < 0) return absl::OkStatus();
    TensorShape flags_shape;
    xla::XlaOp flags;
    TF_RETURN_IF_ERROR(
        ctx->ReadVariableInput(flags_input, tensorflow::DT_BOOL, &flags_shape, &flags));
    if (shape.dims() == 0 || flags_shape != TensorShape({shape.dim_size(0)})) {
      return absl::InvalidArgumentError(
          absl::StrCat("touched_rows for variables[", i, "] of shape ", shape.DebugString(),
                       " have shape ", flags_shape.DebugString(), "."));
    }
    *written = xla::And(*written, xla::BroadcastInDim(flags, shape.dim_sizes(), {0}));
    return absl::OkStatus();
  }

  Step Apply(XlaOpKernelContext* ctx, xla::XlaOp x, xla::XlaOp g,
             const std::vector<xla::XlaOp>& slots) const {
    const UpdateSettings& settings = attributes_.settings;
    const xla::XlaOp rate = ctx->Input("rate");
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
