// AccumOps>Accumulate lowered to XLA, for functions with jit_compile=True. XLA fuses it with the
// gradients' producers.
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "accumulate_attributes.h"
#include "input_checks.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/hlo/builder/xla_computation.h"
#include "xla_support.h"
#include "xla_variable_list.h"

namespace accumops {
namespace {

xla::XlaComputation Binary(xla::PrimitiveType type, xla::XlaOp (*combine)(xla::XlaOp, xla::XlaOp),
                           const char* name) {
  xla::XlaBuilder builder(name);
  const xla::Shape scalar = xla::ShapeUtil::MakeShape(type, {});
  combine(xla::Parameter(&builder, 0, scalar, "a"), xla::Parameter(&builder, 1, scalar, "b"));
  return builder.Build().value();
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
    OP_REQUIRES_OK(construction, attributes_.Read(*construction));
  }

  void Compile(XlaOpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "scale"));
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "overwrite"));
    xla::XlaOp adds, wants_norms;
    OP_REQUIRES_OK(ctx, ReadOptionalFlag(ctx, "only_if", &adds));
    OP_REQUIRES_OK(ctx, ReadOptionalFlag(ctx, "norms_if", &wants_norms));
    XlaVariableList variables(ctx);
    OP_REQUIRES_OK(ctx, variables.Add({"accumulators", "touched_rows"}));
    xla::XlaBuilder* builder = ctx->builder();
    const xla::XlaOp scale = ctx->Input("scale");
    const xla::XlaOp overwrite = ctx->Input("overwrite");
    xla::XlaOp all_finite = xla::ConstantR0<bool>(builder, true);
    std::vector<xla::XlaOp> gradient_norms, accumulator_norms;

    // XLA writes every variable, where nothing is added with what it holds.
    const auto added = [adds](xla::XlaOp result, xla::XlaOp before, const TensorShape& shape) {
      return xla::Select(xla::Broadcast(adds, shape.dim_sizes()), result, before);
    };

    // Every input is read and checked before the first variable is assigned.
    std::vector<xla::XlaOp> results(attributes_.count + attributes_.tracked);
    for (std::size_t i = 0; i < attributes_.count; ++i) {
      const bool is_dense = i < attributes_.dense();
      const int gradient_input = static_cast<int>(attributes_.count + i);
      const int index_input =
          static_cast<int>(2 * attributes_.count + (is_dense ? 0 : i - attributes_.dense()));
      // How many rows a sparse gradient has may be known late: each is added where its index says.
      const Dimensions known = {is_dense ? 0 : 1};
      const TensorShape gradient_shape =
          InputTensorShape(ctx, gradient_input, absl::StrCat("gradients[", i, "]"), known);
      const TensorShape index_shape =
          is_dense ? TensorShape() : InputTensorShape(ctx, index_input, "indices", known);
      OP_REQUIRES_OK(ctx,
                     CheckAccumulator(variables, attributes_, i, ctx->input_type(gradient_input),
                                      gradient_shape, is_dense ? nullptr : &index_shape));
      xla::XlaOp accumulator;
      OP_REQUIRES_OK(ctx, variables.Read(i, &accumulator));
      const TensorShape& shape = variables.shape(i);
      const xla::PrimitiveType type =
          variables.dtype(i) == tensorflow::DT_DOUBLE ? xla::F64 : xla::F32;
      const xla::XlaOp gradient = ctx->Input(gradient_input);
      const xla::XlaOp zero = xla::Zero(builder, type);
      const xla::XlaOp factor = xla::ConvertElementType(scale, type);
      const xla::XlaOp counts = xla::Ne(factor, zero);
      // -0 is what changes no sum, not even that of -0.
      const xla::XlaOp scaled = WhereOr(xla::Mul(xla::ConvertElementType(gradient, type), factor),
                                        counts, xla::Neg(zero), gradient_shape);
      const xla::XlaOp start = WhereOr(accumulator, xla::Not(overwrite), zero, shape);
      if (is_dense) {
        results[i] = xla::Add(start, scaled);
        if (attributes_.squared_norms) {
          gradient_norms.push_back(SquaredNorm(gradient));
          accumulator_norms.push_back(SquaredNorm(results[i]));
        }
      } else {
        const xla::XlaOp indices = ctx->Input(index_input);
        results[i] = ScatterRows(start, indices, scaled, shape.dims(), Sum(type));
        if (i >= attributes_.untracked()) {
          const std::size_t flags_of = attributes_.FlagsOf(i);
          xla::XlaOp flags;
          OP_REQUIRES_OK(ctx, variables.Read(flags_of, &flags));
          const xla::XlaOp none = xla::ConstantR0<bool>(builder, false);
          const xla::XlaOp set = xla::Broadcast(counts, {index_shape.dim_size(0)});
          const TensorShape& flags_shape = variables.shape(flags_of);
          const xla::XlaOp kept = WhereOr(flags, xla::Not(overwrite), none, flags_shape);
          results[flags_of] = added(ScatterRows(kept, indices, set, 1, Any()), flags, flags_shape);
        }
      }
      results[i] = added(results[i], accumulator, shape);
      if (attributes_.check_finite) {
        all_finite = xla::And(all_finite, AllFinite(gradient));
      }
    }
    for (std::size_t i = 0; i < results.size(); ++i) {
      OP_REQUIRES_OK(ctx, variables.Assign(i, results[i]));
    }
    if (attributes_.check_finite) ctx->SetOutput(0, xla::Or(all_finite, xla::Not(adds)));
    if (attributes_.squared_norms) {
      const TensorShape shape({2, static_cast<std::int64_t>(attributes_.dense())});
      gradient_norms.insert(gradient_norms.end(), accumulator_norms.begin(),
                            accumulator_norms.end());
      const xla::XlaOp norms =
          shape.num_elements() == 0
              ? xla::Broadcast(xla::Zero(builder, xla::F64), shape.dim_sizes())
              : xla::Reshape(xla::ConcatInDim(builder, gradient_norms, 0), shape.dim_sizes());
      const double nan = std::numeric_limits<double>::quiet_NaN();
      ctx->SetOutput(attributes_.check_finite ? 1 : 0,
                     WhereOr(norms, xla::And(adds, wants_norms),
                             xla::ConstantR0<double>(builder, nan), shape));
    }
  }

 private:
  AccumulateAttributes attributes_;
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
