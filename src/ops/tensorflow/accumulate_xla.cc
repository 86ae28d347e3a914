// AccumOps>Accumulate lowered to XLA, for functions with jit_compile=True. XLA fuses it with the
// gradients' producers.
#include <limits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/hlo/builder/xla_computation.h"
#include "xla_support.h"

namespace accumops {
namespace {

xla::XlaComputation Binary(xla::PrimitiveType type, xla::XlaOp (*combine)(xla::XlaOp, xla::XlaOp),
                           const char* name) {
  xla::XlaBuilder builder(name);
  const xla::Shape scalar = xla::ShapeUtil::MakeShape(type, {});
  combine(xla::Parameter(&builder, 0, scalar, "a"), xla::Parameter(&builder, 1, scalar, "b"));
  return builder.Build().value();
}

xla::XlaComputation All() {
  return Binary(xla::PRED, [](xla::XlaOp a, xla::XlaOp b) { return xla::And(a, b); }, "all");
}
xla::XlaComputation Any() {
  return Binary(xla::PRED, [](xla::XlaOp a, xla::XlaOp b) { return xla::Or(a, b); }, "any");
}

// Combines whole rows, updates[i] into row indices[i] of `operand`.
xla::XlaOp ScatterRows(xla::XlaOp operand, xla::XlaOp indices, xla::XlaOp updates, int rank,
                       const xla::XlaComputation& combine) {
  xla::ScatterDimensionNumbers numbers;
  for (int i = 1; i < rank; ++i) numbers.add_update_window_dims(i);
  numbers.add_inserted_window_dims(0);
  numbers.add_scatter_dims_to_operand_dims(0);
  numbers.set_index_vector_dim(1);
  return xla::Scatter(operand, indices, updates, combine, numbers);
}

// `value` if `condition`, a scalar, and else `other`, a scalar too. Not a product: either side may
// hold NaN where it does not count.
xla::XlaOp WhereOr(xla::XlaOp value, xla::XlaOp condition, xla::XlaOp other,
                   const TensorShape& shape) {
  return xla::Select(xla::Broadcast(condition, shape.dim_sizes()), value,
                     xla::Broadcast(other, shape.dim_sizes()));
}

class AccumulateXlaOp : public XlaOpKernel {
 public:
  explicit AccumulateXlaOp(OpKernelConstruction* construction) : XlaOpKernel(construction) {
    OP_REQUIRES_OK(construction, construction->GetAttr("N", &count_));
    OP_REQUIRES_OK(construction, construction->GetAttr("M", &touched_));
    OP_REQUIRES_OK(construction, construction->GetAttr("R", &flags_));
    std::vector<DataType> index_types;
    OP_REQUIRES_OK(construction, construction->GetAttr("index_types", &index_types));
    sparse_ = static_cast<int>(index_types.size());
    std::vector<DataType> finite, norms;
    OP_REQUIRES_OK(construction, construction->GetAttr("check_finite", &finite));
    OP_REQUIRES_OK(construction, construction->GetAttr("squared_norms", &norms));
    check_finite_ = static_cast<int>(finite.size());
    squared_norms_ = static_cast<int>(norms.size());
    OP_REQUIRES(construction,
                check_finite_ <= 1 && squared_norms_ <= 1 && flags_ <= 1 && sparse_ <= count_ &&
                    touched_ <= sparse_,
                absl::InvalidArgumentError("Accumulate got lists of lengths that do not match."));
  }

  void Compile(XlaOpKernelContext* ctx) override {
    const int scalars = 2 * count_ + sparse_ + touched_;
    OP_REQUIRES_OK(ctx, RequireScalarInput(ctx, scalars, "scale"));
    OP_REQUIRES_OK(ctx, RequireScalarInput(ctx, scalars + 1, "overwrite"));
    if (flags_ > 0) OP_REQUIRES_OK(ctx, RequireScalarInput(ctx, scalars + 2, "norms_if"));
    xla::XlaBuilder* builder = ctx->builder();
    const xla::XlaOp scale = ctx->Input("scale");
    const xla::XlaOp overwrite = ctx->Input("overwrite");
    xla::XlaOp all_finite = xla::ConstantR0<bool>(builder, true);
    std::vector<xla::XlaOp> gradient_norms, accumulator_norms;

    // Every input is read and checked before the first variable is assigned.
    std::vector<std::pair<DataType, xla::XlaOp>> results(count_ + touched_);
    for (int i = 0; i < count_; ++i) {
      DataType dtype;
      TensorShape shape;
      OP_REQUIRES_OK(ctx, ctx->GetVariableTypeAndShape(i, &dtype, &shape));
      const int gradient_input = count_ + i;
      OP_REQUIRES(ctx,
                  dtype == tensorflow::DT_DOUBLE ||
                      (dtype == tensorflow::DT_FLOAT &&
                       ctx->input_type(gradient_input) != tensorflow::DT_DOUBLE),
                  absl::InvalidArgumentError(absl::StrCat(
                      "accumulators[", i, "] is ", DataTypeString(dtype), " and gradients[", i,
                      "] is ", DataTypeString(ctx->input_type(gradient_input)),
                      ": accumulators are float32, or float64, which float64 gradients need.")));
      xla::XlaOp accumulator;
      OP_REQUIRES_OK(ctx, ctx->ReadVariableInput(i, dtype, &shape, &accumulator));
      const xla::PrimitiveType type = dtype == tensorflow::DT_DOUBLE ? xla::F64 : xla::F32;
      const xla::XlaOp gradient = ctx->Input(gradient_input);
      const xla::XlaOp zero = xla::Zero(builder, type);
      const xla::XlaOp factor = xla::ConvertElementType(scale, type);
      const xla::XlaOp counts = xla::Ne(factor, zero);
      const TensorShape gradient_shape = InputTensorShape(ctx, gradient_input);
      // -0 is what changes no sum, not even that of -0.
      const xla::XlaOp scaled = WhereOr(xla::Mul(xla::ConvertElementType(gradient, type), factor),
                                        counts, xla::Neg(zero), gradient_shape);
      const xla::XlaOp start = WhereOr(accumulator, xla::Not(overwrite), zero, shape);
      const int row_list = i - (count_ - sparse_);
      if (row_list < 0) {
        OP_REQUIRES(ctx, gradient_shape == shape, Mismatch(i, shape, gradient_shape));
        results[i] = {dtype, xla::Add(start, scaled)};
        if (squared_norms_ > 0) {
          gradient_norms.push_back(SquaredNorm(gradient));
          accumulator_norms.push_back(SquaredNorm(results[i].second));
        }
      } else {
        const int index_input = 2 * count_ + row_list;
        const TensorShape index_shape = InputTensorShape(ctx, index_input);
        TensorShape expected = shape;
        if (shape.dims() > 0 && index_shape.dims() == 1) {
          expected.set_dim(0, index_shape.dim_size(0));
        }
        OP_REQUIRES(ctx, shape.dims() > 0 && index_shape.dims() == 1 && gradient_shape == expected,
                    Mismatch(i, shape, gradient_shape));
        const xla::XlaOp indices = ctx->Input(index_input);
        results[i] = {dtype, ScatterRows(start, indices, scaled, shape.dims(), Sum(type))};
        const int flag_list = i - (count_ - touched_);
        if (flag_list >= 0) {
          const int flags_input = 2 * count_ + sparse_ + flag_list;
          TensorShape flags_shape;
          xla::XlaOp flags;
          OP_REQUIRES_OK(
              ctx, ctx->ReadVariableInput(flags_input, tensorflow::DT_BOOL, &flags_shape, &flags));
          OP_REQUIRES(ctx, flags_shape == TensorShape({shape.dim_size(0)}),
                      absl::InvalidArgumentError(absl::StrCat(
                          "touched_rows[", flag_list, "] has shape ", flags_shape.DebugString(),
                          "; accumulators[", i, "] has shape ", shape.DebugString(), ".")));
          const xla::XlaOp none = xla::ConstantR0<bool>(builder, false);
          const xla::XlaOp set = xla::Broadcast(counts, {index_shape.dim_size(0)});
          results[count_ + flag_list] = {
              tensorflow::DT_BOOL,
              ScatterRows(WhereOr(flags, xla::Not(overwrite), none, flags_shape), indices, set, 1,
                          Any())};
        }
      }
      if (check_finite_ > 0) {
        all_finite = xla::And(
            all_finite,
            xla::ReduceAll(xla::IsFinite(gradient), xla::ConstantR0<bool>(builder, true), All()));
      }
    }
    for (int i = 0; i < count_; ++i) {
      OP_REQUIRES_OK(ctx, ctx->AssignVariable(i, results[i].first, results[i].second));
    }
    for (int i = 0; i < touched_; ++i) {
      OP_REQUIRES_OK(ctx, ctx->AssignVariable(2 * count_ + sparse_ + i, results[count_ + i].first,
                                              results[count_ + i].second));
    }
    if (check_finite_ > 0) ctx->SetOutput(0, all_finite);
    if (squared_norms_ > 0) {
      const TensorShape shape({2, count_ - sparse_});
      gradient_norms.insert(gradient_norms.end(), accumulator_norms.begin(),
                            accumulator_norms.end());
      xla::XlaOp norms =
          shape.num_elements() == 0
              ? xla::Broadcast(xla::Zero(builder, xla::F64), shape.dim_sizes())
              : xla::Reshape(xla::ConcatInDim(builder, gradient_norms, 0), shape.dim_sizes());
      if (flags_ > 0) {
        const double nan = std::numeric_limits<double>::quiet_NaN();
        norms =
            WhereOr(norms, ctx->Input(scalars + 2), xla::ConstantR0<double>(builder, nan), shape);
      }
      ctx->SetOutput(check_finite_, norms);
    }
  }

 private:
  static absl::Status Mismatch(int i, const TensorShape& accumulator, const TensorShape& gradient) {
    return absl::InvalidArgumentError(absl::StrCat("accumulators[", i, "] has shape ",
                                                   accumulator.DebugString(), " but gradients[", i,
                                                   "] has shape ", gradient.DebugString(), "."));
  }

  int count_ = 0;
  int sparse_ = 0;
  int touched_ = 0;
  int flags_ = 0;
  int check_finite_ = 0;
  int squared_norms_ = 0;
};

// Straight to the compilation devices and not through REGISTER_XLA_OP: TensorFlow hands that
// registry's kernels to the devices once, at the process's first compilation, and a library that is
// loaded later would be too late.
REGISTER_KERNEL_BUILDER(Name("AccumOps>Accumulate").Device(tensorflow::DEVICE_CPU_XLA_JIT),
                        AccumulateXlaOp);
REGISTER_KERNEL_BUILDER(Name("AccumOps>Accumulate").Device(tensorflow::DEVICE_GPU_XLA_JIT),
                        AccumulateXlaOp);

}  // namespace
}  // namespace accumops
