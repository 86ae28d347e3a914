// AccumOps>BatchNorm and its relatives lowered to XLA, for functions with jit_compile=True.
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "batch_norm_attributes.h"
#include "input_checks.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla_support.h"

namespace accumops {
namespace {

xla::PrimitiveType WideType(DataType dtype) {
  return dtype == tensorflow::DT_DOUBLE ? xla::F64 : xla::F32;
}

// All sizes may be known late: how many values a channel has is read when it runs.
constexpr Dimensions kNone = {0, 0};

// An array, the dimension of its channels, and its values in the statistics' type.
class Channels {
 public:
  Channels(xla::XlaOp x, const TensorShape& shape, int axis, xla::PrimitiveType type)
      : builder_(x.builder()), x_(x), axis_(axis), type_(type), values_(Widen(x)) {
    for (int i = 0; i < shape.dims(); ++i) {
      sizes_.push_back(shape.dim_size(i));
      if (i != axis) others_.push_back(i);
    }
  }

  xla::XlaOp values() const { return values_; }
  xla::XlaOp Widen(xla::XlaOp x) const { return xla::ConvertElementType(x, type_); }
  // Puts a value for each channel at all places of the channel.
  xla::XlaOp Spread(xla::XlaOp channels) const {
    return xla::BroadcastInDim(channels, sizes_, {axis_});
  }
  // The values at the places of a mask, and zero elsewhere.
  xla::XlaOp Masked(xla::XlaOp values, xla::XlaOp mask) const {
    return xla::Select(xla::BroadcastInDim(mask, sizes_, others_), values, xla::ZerosLike(values));
  }
  // In double: XLA adds one after another, and float would stop growing.
  xla::XlaOp Sum(xla::XlaOp values) const {
    return Widen(xla::Reduce(xla::ConvertElementType(values, xla::F64),
                             xla::Zero(builder_, xla::F64), accumops::Sum(xla::F64), others_));
  }
  // How many values a channel has. A size that XLA learns when it runs is read then; others are
  // constants.
  xla::XlaOp count() const {
    xla::XlaOp count = xla::One(builder_, xla::S64);
    for (const std::int64_t i : others_) {
      count = count * xla::ConvertElementType(xla::GetDimensionSize(x_, i), xla::S64);
    }
    return count;
  }

 private:
  xla::XlaBuilder* builder_;
  xla::XlaOp x_;
  std::vector<std::int64_t> sizes_;
  std::vector<std::int64_t> others_;
  std::int64_t axis_;
  xla::PrimitiveType type_;
  xla::XlaOp values_;
};

class BatchNormXlaOp : public XlaOpKernel {
 public:
  explicit BatchNormXlaOp(OpKernelConstruction* construction) : XlaOpKernel(construction) {
    OP_REQUIRES_OK(construction, attributes_.Read(*construction));
  }

 protected:
  xla::PrimitiveType type() const { return WideType(attributes_.statistics); }
  xla::XlaOp Scalar(XlaOpKernelContext* ctx, double value) const {
    return xla::ConvertElementType(xla::ConstantR0<double>(ctx->builder(), value), type());
  }
  xla::XlaOp Inverse(XlaOpKernelContext* ctx, xla::XlaOp variance) const {
    return xla::Rsqrt(variance + Scalar(ctx, static_cast<double>(attributes_.epsilon)));
  }
  // The array at x. Checks its shape, those of inputs with a value for each channel, and the
  // mask's.
  absl::StatusOr<Channels> Read(XlaOpKernelContext* ctx,
                                std::initializer_list<const char*> names) const {
    const int axis = attributes_.axis;
    const TensorShape shape = InputTensorShape(ctx, "x", {axis, axis + 1});
    TF_RETURN_IF_ERROR(CheckAxis(axis, shape));
    for (const char* name : names) {
      TF_RETURN_IF_ERROR(CheckChannels(name, InputTensorShape(ctx, name), shape.dim_size(axis)));
    }
    if (has_mask()) {
      TF_RETURN_IF_ERROR(CheckMask(axis, shape, InputTensorShape(ctx, "mask", kNone)));
    }
    return Channels(ctx->Input("x"), shape, axis, type());
  }
  bool has_mask() const { return attributes_.masks > 0; }

 private:
  BatchNormAttributes attributes_;
};

class ForwardXlaOp : public BatchNormXlaOp {
 public:
  using BatchNormXlaOp::BatchNormXlaOp;

  void Compile(XlaOpKernelContext* ctx) override {
    const auto channels = Read(ctx, {"gamma", "beta"});
    OP_REQUIRES_OK(ctx, channels.status());
    const Channels& x = *channels;
    xla::XlaOp count = x.count();
    if (has_mask()) {
      const xla::XlaOp mask = xla::ConvertElementType(ctx->Input("mask"), xla::S64);
      count = xla::ReduceAll(mask, xla::Zero(ctx->builder(), xla::S64), Sum(xla::S64));
    }
    const auto mean_of = [&](xla::XlaOp values) {
      const xla::XlaOp size =
          x.Widen(xla::Max(count, xla::ConstantR0<std::int64_t>(ctx->builder(), 1)));
      return x.Sum(has_mask() ? x.Masked(values, ctx->Input("mask")) : values) / size;
    };
    const xla::XlaOp mean = mean_of(x.values());
    const xla::XlaOp rest = mean_of(x.values() - x.Spread(mean));
    const xla::XlaOp distance = x.values() - x.Spread(mean) - x.Spread(rest);
    const xla::XlaOp variance = mean_of(distance * distance);
    const xla::XlaOp inverse = Inverse(ctx, variance);
    const xla::XlaOp scale = ctx->Input(1) * inverse;
    const xla::XlaOp y = distance * x.Spread(scale) + x.Spread(ctx->Input(2));
    ctx->SetOutput(0, xla::ConvertElementType(y, ctx->input_xla_type(0)));
    ctx->SetOutput(1, mean);
    ctx->SetOutput(2, rest);
    ctx->SetOutput(3, variance);
    ctx->SetOutput(4, inverse);
    ctx->SetOutput(5, count);
  }
};

class GradientXlaOp : public BatchNormXlaOp {
 public:
  using BatchNormXlaOp::BatchNormXlaOp;

  void Compile(XlaOpKernelContext* ctx) override {
    const auto channels = Read(ctx, {"gamma", "mean", "rest", "inverse"});
    OP_REQUIRES_OK(ctx, channels.status());
    OP_REQUIRES_OK(
        ctx, CheckGradient(InputTensorShape(ctx, "dy", kNone), InputTensorShape(ctx, "x", kNone)));
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "count"));
    const Channels& x = *channels;
    const xla::XlaOp dy = x.Widen(ctx->Input(0));
    const xla::XlaOp inverse = ctx->Input(5);
    const xla::XlaOp normal =
        (x.values() - x.Spread(ctx->Input(3)) - x.Spread(ctx->Input(4))) * x.Spread(inverse);
    const xla::XlaOp dbeta = x.Sum(dy);
    const xla::XlaOp dgamma = x.Sum(dy * normal);
    // Nothing comes back through moments of no values, or through moments that were given.
    const xla::XlaOp count = x.Widen(ctx->Input(6));
    const xla::XlaOp zero = xla::Zero(ctx->builder(), type());
    const xla::XlaOp share =
        xla::Select(xla::Gt(count, zero), xla::One(ctx->builder(), type()) / count, zero);
    xla::XlaOp through = (x.Spread(dbeta) + normal * x.Spread(dgamma)) * share;
    if (has_mask()) through = x.Masked(through, ctx->Input("mask"));
    const xla::XlaOp dx = x.Spread(ctx->Input(2) * inverse) * (dy - through);
    ctx->SetOutput(0, xla::ConvertElementType(dx, ctx->input_xla_type(1)));
    ctx->SetOutput(1, dgamma);
    ctx->SetOutput(2, dbeta);
  }
};

class InferenceXlaOp : public BatchNormXlaOp {
 public:
  using BatchNormXlaOp::BatchNormXlaOp;

  void Compile(XlaOpKernelContext* ctx) override {
    const auto channels = Read(ctx, {"gamma", "beta", "mean", "variance"});
    OP_REQUIRES_OK(ctx, channels.status());
    const Channels& x = *channels;
    const xla::XlaOp scale = ctx->Input(1) * Inverse(ctx, ctx->Input(4));
    const xla::XlaOp y =
        (x.values() - x.Spread(ctx->Input(3))) * x.Spread(scale) + x.Spread(ctx->Input(2));
    ctx->SetOutput(0, xla::ConvertElementType(y, ctx->input_xla_type(0)));
  }
};

// Straight to the compilation devices, as accumulate_xla.cc explains.
#define ACCUMOPS_REGISTER(DEVICE)                                                        \
  REGISTER_KERNEL_BUILDER(Name("AccumOps>BatchNorm").Device(DEVICE), ForwardXlaOp);      \
  REGISTER_KERNEL_BUILDER(Name("AccumOps>BatchNormGrad").Device(DEVICE), GradientXlaOp); \
  REGISTER_KERNEL_BUILDER(Name("AccumOps>BatchNormInference").Device(DEVICE), InferenceXlaOp)

ACCUMOPS_REGISTER(tensorflow::DEVICE_CPU_XLA_JIT);
ACCUMOPS_REGISTER(tensorflow::DEVICE_GPU_XLA_JIT);

}  // namespace
}  // namespace accumops
