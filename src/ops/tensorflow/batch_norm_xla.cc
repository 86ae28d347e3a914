// AccumOps>BatchNorm and its relatives lowered to XLA, for functions with jit_compile=True.
#include <cstdint>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernel_support.h"
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

// An array, the dimension of its channels, and its values in the statistics' type.
class Channels {
 public:
  Channels(xla::XlaOp x, const TensorShape& shape, int axis, xla::PrimitiveType type)
      : builder_(x.builder()), axis_(axis), type_(type), values_(Widen(x)) {
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
  std::int64_t count() const {
    std::int64_t count = 1;
    for (const std::int64_t i : others_) count *= sizes_[i];
    return count;
  }

 private:
  xla::XlaBuilder* builder_;
  std::vector<std::int64_t> sizes_;
  std::vector<std::int64_t> others_;
  std::int64_t axis_;
  xla::PrimitiveType type_;
  xla::XlaOp values_;
};

class BatchNormXlaOp : public XlaOpKernel {
 public:
  explicit BatchNormXlaOp(OpKernelConstruction* construction) : XlaOpKernel(construction) {
    OP_REQUIRES_OK(construction, construction->GetAttr("axis", &axis_));
    OP_REQUIRES_OK(construction, construction->GetAttr("U", &statistics_));
    DataType data;
    OP_REQUIRES_OK(construction, construction->GetAttr("T", &data));
    OP_REQUIRES(
        construction, WideType(data) == WideType(statistics_),
        absl::InvalidArgumentError(absl::StrCat(
            "x is ", DataTypeString(data), " and its statistics are ", DataTypeString(statistics_),
            ": they are double for double data, else float.")));
    if (construction->HasAttr("epsilon")) {
      OP_REQUIRES_OK(construction, construction->GetAttr("epsilon", &epsilon_));
      OP_REQUIRES(construction, epsilon_ >= 0,
                  absl::InvalidArgumentError(
                      absl::StrCat("epsilon must not be negative, not ", epsilon_, ".")));
    }
    if (construction->HasAttr("mask_count")) {
      OP_REQUIRES_OK(construction, construction->GetAttr("mask_count", &masks_));
    }
    OP_REQUIRES(
        construction, masks_ <= 1,
        absl::InvalidArgumentError(absl::StrCat("mask_count must be 0 or 1, not ", masks_, ".")));
  }

 protected:
  xla::PrimitiveType type() const { return WideType(statistics_); }
  xla::XlaOp Scalar(XlaOpKernelContext* ctx, double value) const {
    return xla::ConvertElementType(xla::ConstantR0<double>(ctx->builder(), value), type());
  }
  xla::XlaOp Inverse(XlaOpKernelContext* ctx, xla::XlaOp variance) const {
    return xla::Rsqrt(variance + Scalar(ctx, static_cast<double>(epsilon_)));
  }
  // The array at `input`, its shape checked against vectors at [first, last) and a mask at `last`.
  absl::StatusOr<Channels> Read(XlaOpKernelContext* ctx, int input, int first, int last) const {
    const TensorShape shape = InputTensorShape(ctx, input);
    if (axis_ < 0 || axis_ >= shape.dims()) {
      return absl::InvalidArgumentError(
          absl::StrCat("axis is ", axis_, ", but x has shape ", shape.DebugString(), "."));
    }
    for (int i = first; i < last; ++i) {
      TF_RETURN_IF_ERROR(RequireChannels(i, InputTensorShape(ctx, i), shape.dim_size(axis_)));
    }
    return Channels(ctx->Input(input), shape, axis_, type());
  }
  absl::Status CheckMask(XlaOpKernelContext* ctx, int input, int x) const {
    TensorShape expected = InputTensorShape(ctx, x);
    if (axis_ != expected.dims() - 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("A mask needs channels in the last dimension, ", "not in ", axis_, "."));
    }
    expected.RemoveLastDims(1);
    if (InputTensorShape(ctx, input) == expected) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("mask has shape ",
                                                   InputTensorShape(ctx, input).DebugString(),
                                                   "; it must be ", expected.DebugString(), "."));
  }

  int axis_ = 0;
  int masks_ = 0;
  float epsilon_ = 0;
  DataType statistics_ = tensorflow::DT_FLOAT;
};

class ForwardXlaOp : public BatchNormXlaOp {
 public:
  using BatchNormXlaOp::BatchNormXlaOp;

  void Compile(XlaOpKernelContext* ctx) override {
    const auto channels = Read(ctx, 0, 1, 3);
    OP_REQUIRES_OK(ctx, channels.status());
    const Channels& x = *channels;
    xla::XlaOp count = xla::ConstantR0<std::int64_t>(ctx->builder(), x.count());
    if (masks_ > 0) {
      OP_REQUIRES_OK(ctx, CheckMask(ctx, 3, 0));
      const xla::XlaOp mask = xla::ConvertElementType(ctx->Input(3), xla::S64);
      count = xla::ReduceAll(mask, xla::Zero(ctx->builder(), xla::S64), Sum(xla::S64));
    }
    const auto mean_of = [&](xla::XlaOp values) {
      const xla::XlaOp size =
          x.Widen(xla::Max(count, xla::ConstantR0<std::int64_t>(ctx->builder(), 1)));
      return x.Sum(masks_ > 0 ? x.Masked(values, ctx->Input(3)) : values) / size;
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
    const auto channels = Read(ctx, 1, 2, 6);
    OP_REQUIRES_OK(ctx, channels.status());
    OP_REQUIRES(ctx, InputTensorShape(ctx, 0) == InputTensorShape(ctx, 1),
                absl::InvalidArgumentError(absl::StrCat(
                    "dy has shape ", InputTensorShape(ctx, 0).DebugString(), " and x has shape ",
                    InputTensorShape(ctx, 1).DebugString(), ".")));
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
    if (masks_ > 0) {
      OP_REQUIRES_OK(ctx, CheckMask(ctx, 7, 1));
      through = x.Masked(through, ctx->Input(7));
    }
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
    const auto channels = Read(ctx, 0, 1, 5);
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
