// AccumOps>MergeMoments, AccumOps>AddToWindows and AccumOps>EndWindows lowered to XLA, for
// functions with jit_compile=True.
#include <vector>

#include "absl/strings/str_cat.h"
#include "input_checks.h"
#include "moments.h"
#include "moments_attributes.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla_support.h"
#include "xla_variable_list.h"

namespace accumops {
namespace {

using xla::XlaOp;

XlaOp Wide(XlaOp x) { return xla::ConvertElementType(x, xla::F64); }

// The window's counters and moments, as they are before a merge; those of no window are empty.
struct Held {
  Held(xla::XlaBuilder* builder, std::int64_t number)
      : channels(number),
        values(xla::Zero(builder, xla::S64)),
        calls(values),
        limit(values),
        mean(xla::Broadcast(xla::Zero(builder, xla::F64), {channels})),
        centred(mean) {}

  // Reads variables i and i + 1.
  absl::Status Read(const XlaVariableList& variables, std::size_t i) {
    XlaOp counters, moments;
    TF_RETURN_IF_ERROR(variables.Read(i, &counters));
    TF_RETURN_IF_ERROR(variables.Read(i + 1, &moments));
    const auto counter = [&](std::int64_t k) {
      return xla::Reshape(xla::Slice(counters, {k}, {k + 1}, {1}), {});
    };
    const XlaOp empty =
        xla::Broadcast(xla::Eq(counter(MomentsWindow::kValues), values), {channels});
    const auto row = [&](std::int64_t k) {
      const XlaOp slice = xla::Slice(moments, {k, 0}, {k + 1, channels}, {1, 1});
      return xla::Select(empty, mean, xla::Reshape(slice, {channels}));
    };
    const XlaOp held_mean = row(0);
    centred = row(1);
    mean = held_mean;
    values = counter(MomentsWindow::kValues);
    calls = counter(MomentsWindow::kCalls);
    limit = counter(MomentsWindow::kLimit);
    return absl::OkStatus();
  }

  std::int64_t channels;
  XlaOp values, calls, limit;
  XlaOp mean, centred;  // vectors with a value for each channel
};

// The window with a batch: `added` values of a channel, and input `moments` and the two after it.
Held Merged(XlaOpKernelContext* ctx, const Held& held, XlaOp added, int moments) {
  xla::XlaBuilder* builder = ctx->builder();
  const XlaOp none = xla::Zero(builder, xla::S64);
  Held merged = held;
  merged.values = held.values + added;
  const XlaOp share = xla::Select(xla::Gt(merged.values, none), Wide(added) / Wide(merged.values),
                                  xla::Zero(builder, xla::F64));
  const XlaOp delta = Wide(ctx->Input(moments)) + Wide(ctx->Input(moments + 1)) - held.mean;
  // A batch without values has no moments: what stands for them may be NaN.
  const XlaOp some = xla::Broadcast(xla::Gt(added, none), {held.channels});
  merged.centred = xla::Select(some,
                               held.centred + Wide(ctx->Input(moments + 2)) * Wide(added) +
                                   delta * delta * (Wide(held.values) * share),
                               held.centred);
  merged.mean = xla::Select(some, held.mean + delta * share, held.mean);
  return merged;
}

absl::Status AssignMoments(const XlaVariableList& variables, std::size_t i, const Held& held) {
  const auto row = [&](XlaOp values) { return xla::Reshape(values, {1, held.channels}); };
  return variables.Assign(
      i, xla::ConcatInDim(held.mean.builder(), {row(held.mean), row(held.centred)}, 0));
}

absl::Status AssignCounters(const XlaVariableList& variables, std::size_t i, XlaOp values,
                            XlaOp calls, XlaOp limit) {
  const auto vector = [](XlaOp x) { return xla::Reshape(x, {1}); };
  return variables.Assign(
      i, xla::ConcatInDim(values.builder(), {vector(values), vector(calls), vector(limit)}, 0));
}

// Moves variables i and i + 1 by the moments of a window, where it ends and has values.
absl::Status Move(const XlaVariableList& variables, std::size_t i, const Held& window, XlaOp ends,
                  XlaOp momentum) {
  const XlaOp none = xla::Zero(ends.builder(), xla::S64);
  const XlaOp one = xla::One(ends.builder(), xla::F64);
  const XlaOp moves =
      xla::Broadcast(xla::And(ends, xla::Gt(window.values, none)), {window.channels});
  const XlaOp size = xla::Max(Wide(window.values), one);
  const XlaOp targets[2] = {window.mean, window.centred / size};
  const bool wide = variables.dtype(i) == tensorflow::DT_DOUBLE;
  const auto like = [&](XlaOp x) { return xla::ConvertElementType(x, wide ? xla::F64 : xla::F32); };
  for (std::size_t k = 0; k < 2; ++k) {
    XlaOp old;
    TF_RETURN_IF_ERROR(variables.Read(i + k, &old));
    const XlaOp moved = old * like(momentum) + like(targets[k]) * like(one - momentum);
    TF_RETURN_IF_ERROR(variables.Assign(i + k, xla::Select(moves, moved, old)));
  }
  return absl::OkStatus();
}

class MergeMomentsXlaOp : public XlaOpKernel {
 public:
  explicit MergeMomentsXlaOp(OpKernelConstruction* construction) : XlaOpKernel(construction) {
    OP_REQUIRES_OK(construction, attributes_.Read(*construction));
  }

  void Compile(XlaOpKernelContext* ctx) override {
    XlaVariableList variables(ctx);
    OP_REQUIRES_OK(ctx, variables.Add({"window", "moving"}));
    const int count = attributes_.window + attributes_.moving;  // its input
    const int moments = count + attributes_.batches;
    std::vector<TensorShape> shapes;
    for (int i = 0; i < 3 * attributes_.batches; ++i) {
      shapes.push_back(InputTensorShape(ctx, moments + i, absl::StrCat("moments[", i, "]")));
    }
    std::int64_t channels = 0;
    OP_REQUIRES_OK(ctx, CheckMoments(variables, attributes_, shapes, &channels));
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "momentum"));
    if (attributes_.batches != 0) OP_REQUIRES_OK(ctx, RequireScalar(ctx, "count"));
    xla::XlaBuilder* builder = ctx->builder();
    Held held(builder, channels);
    const XlaOp none = held.values;
    if (attributes_.window != 0) OP_REQUIRES_OK(ctx, held.Read(variables, 0));
    const XlaOp calls = held.calls + xla::One(builder, xla::S64);
    Held merged = held;
    if (attributes_.batches != 0) {
      XlaOp added = ctx->Input(count);
      if (attributes_.only_finite) {
        added = xla::Select(
            xla::And(AllFinite(ctx->Input(moments)), AllFinite(ctx->Input(moments + 2))), added,
            none);
      }
      merged = Merged(ctx, held, added, moments);
    }

    XlaOp ends = xla::ConstantR0<bool>(builder, attributes_.moving != 0);
    if (attributes_.moving != 0) {
      if (attributes_.window != 0 && attributes_.batches != 0) ends = xla::Ge(calls, held.limit);
      OP_REQUIRES_OK(ctx, Move(variables, static_cast<std::size_t>(attributes_.window), merged,
                               ends, ctx->Input("momentum")));
    }
    if (attributes_.window != 0) {
      OP_REQUIRES_OK(ctx, AssignCounters(variables, 0, xla::Select(ends, none, merged.values),
                                         xla::Select(ends, none, calls), held.limit));
      OP_REQUIRES_OK(ctx, AssignMoments(variables, 1, merged));
    }
  }

 private:
  MomentsAttributes attributes_;
};

class AddToWindowsXlaOp : public XlaOpKernel {
 public:
  explicit AddToWindowsXlaOp(OpKernelConstruction* construction) : XlaOpKernel(construction) {
    OP_REQUIRES_OK(construction, attributes_.Read(*construction));
  }

  void Compile(XlaOpKernelContext* ctx) override {
    XlaVariableList variables(ctx);
    OP_REQUIRES_OK(ctx, variables.Add({"windows"}));
    std::vector<std::int64_t> channels;
    OP_REQUIRES_OK(ctx, CheckWindows(variables, attributes_.windows, /*moving=*/false, &channels));
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "applies"));
    const int counts = 2 * attributes_.windows;  // the first input of each list
    const int moments = counts + attributes_.windows;
    for (int i = 0; i < attributes_.windows; ++i) {
      const std::string count = absl::StrCat("counts[", i, "]");
      OP_REQUIRES_OK(ctx, CheckScalar(count.c_str(), InputTensorShape(ctx, counts + i, count)));
      for (int k = 3 * i; k < 3 * i + 3; ++k) {
        const std::string name = absl::StrCat("moments[", k, "]");
        OP_REQUIRES_OK(ctx, CheckChannels(name.c_str(), InputTensorShape(ctx, moments + k, name),
                                          channels[static_cast<std::size_t>(i)]));
      }
    }
    const XlaOp applies = ctx->Input("applies");
    const XlaOp one = xla::One(ctx->builder(), xla::S64);
    for (std::size_t i = 0; i < channels.size(); ++i) {
      const int batch = static_cast<int>(i);
      Held held(ctx->builder(), channels[i]);
      const XlaOp none = held.values;
      OP_REQUIRES_OK(ctx, held.Read(variables, 2 * i));
      // Where nothing applies, an empty batch is added, which is no call.
      const XlaOp added = xla::Select(applies, ctx->Input(counts + batch), none);
      const Held merged = Merged(ctx, held, added, moments + 3 * batch);
      const XlaOp calls = held.calls + xla::Select(applies, one, none);
      OP_REQUIRES_OK(ctx, AssignCounters(variables, 2 * i, merged.values, calls, held.limit));
      OP_REQUIRES_OK(ctx, AssignMoments(variables, 2 * i + 1, merged));
    }
  }

 private:
  AddToWindowsAttributes attributes_;
};

class EndWindowsXlaOp : public XlaOpKernel {
 public:
  explicit EndWindowsXlaOp(OpKernelConstruction* construction) : XlaOpKernel(construction) {
    OP_REQUIRES_OK(construction, attributes_.Read(*construction));
  }

  void Compile(XlaOpKernelContext* ctx) override {
    XlaVariableList variables(ctx);
    OP_REQUIRES_OK(ctx, variables.Add({"windows", "moving"}));
    std::vector<std::int64_t> channels;
    OP_REQUIRES_OK(ctx,
                   CheckWindows(variables, attributes_.windows, attributes_.moving, &channels));
    OP_REQUIRES_OK(ctx, CheckMomenta(attributes_, InputTensorShape(ctx, "momenta")));
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "applies"));
    const XlaOp ends = ctx->Input("applies");
    for (std::size_t i = 0; i < channels.size(); ++i) {
      Held held(ctx->builder(), channels[i]);
      const XlaOp none = held.values;
      OP_REQUIRES_OK(ctx, held.Read(variables, 2 * i));
      if (attributes_.moving) {
        const auto at = static_cast<std::int64_t>(i);
        const XlaOp momentum =
            xla::Reshape(xla::Slice(ctx->Input("momenta"), {at}, {at + 1}, {1}), {});
        OP_REQUIRES_OK(ctx, Move(variables, 2 * (channels.size() + i), held, ends, momentum));
      }
      OP_REQUIRES_OK(ctx, AssignCounters(variables, 2 * i, xla::Select(ends, none, held.values),
                                         xla::Select(ends, none, held.calls), held.limit));
    }
  }

 private:
  EndWindowsAttributes attributes_;
};

// Straight to the compilation devices, as accumulate_xla.cc explains.
REGISTER_KERNEL_BUILDER(Name("AccumOps>MergeMoments").Device(tensorflow::DEVICE_CPU_XLA_JIT),
                        MergeMomentsXlaOp);
REGISTER_KERNEL_BUILDER(Name("AccumOps>MergeMoments").Device(tensorflow::DEVICE_GPU_XLA_JIT),
                        MergeMomentsXlaOp);
REGISTER_KERNEL_BUILDER(Name("AccumOps>AddToWindows").Device(tensorflow::DEVICE_CPU_XLA_JIT),
                        AddToWindowsXlaOp);
REGISTER_KERNEL_BUILDER(Name("AccumOps>AddToWindows").Device(tensorflow::DEVICE_GPU_XLA_JIT),
                        AddToWindowsXlaOp);
REGISTER_KERNEL_BUILDER(Name("AccumOps>EndWindows").Device(tensorflow::DEVICE_CPU_XLA_JIT),
                        EndWindowsXlaOp);
REGISTER_KERNEL_BUILDER(Name("AccumOps>EndWindows").Device(tensorflow::DEVICE_GPU_XLA_JIT),
                        EndWindowsXlaOp);

}  // namespace
}  // namespace accumops
