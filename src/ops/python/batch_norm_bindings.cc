// batch_norm(), its gradient, inference, and the size of the workspace of the first two.
#include <optional>
#include <string>

#include "batch_norm.h"
#include "bindings.h"
#include "call.h"

namespace accumops {
namespace {

BatchNormShape ToShape(const Array& x, std::int64_t axis) {
  const auto axes = static_cast<std::int64_t>(x.shape.size());
  if (axis < -axes || axis >= axes) {
    throw py::value_error("axis is " + std::to_string(axis) + ", but x has shape " +
                          ShapeText(x.shape));
  }
  if (axis < 0) axis += axes;
  BatchNormShape shape = {1, x.shape[static_cast<std::size_t>(axis)], 1};
  bool fits = true;
  for (std::int64_t i = 0; i < axes; ++i) {
    if (i == axis) continue;
    std::int64_t& extent = i < axis ? shape.outer : shape.inner;
    fits &= !__builtin_mul_overflow(extent, x.shape[static_cast<std::size_t>(i)], &extent);
  }
  std::int64_t values = 0;
  fits &= !__builtin_mul_overflow(shape.outer, shape.inner, &values);
  fits &= !__builtin_mul_overflow(values, shape.channels, &values);
  if (!fits) throw py::value_error("x has shape " + ShapeText(x.shape) + ", which is too large");
  if (shape.channels == 0) {
    throw py::value_error("x has shape " + ShapeText(x.shape) + "; it must have channels");
  }
  // An array without values may have any number of rows, and the kernels would visit each.
  if (shape.inner == 0) shape.outer = 0;
  return shape;
}

// Checks what a call has beside x, and adds it to the call.
class Arguments {
 public:
  Arguments(const Array& x, std::int64_t axis, Call& call)
      : x_(x), shape_(ToShape(x, axis)), dtype_(ToDType(x)), call_(call) {
    last_ = shape_.inner == 1 && (axis == -1 || axis + 1 == Axes());
    call_.Read(x);
  }

  const BatchNormShape& shape() const { return shape_; }
  DType dtype() const { return dtype_; }

  // They take an array like x.
  const void* ReadLike(const Array& array) { return call_.Read(RequireLike(array)), array.data; }
  void* WriteLike(const Array& array) { return call_.Write(RequireLike(array)), array.data; }

  // They take an array with a value for each channel.
  void* ReadChannels(const Array& array) { return call_.Read(RequireChannels(array)), array.data; }
  void* WriteChannels(const Array& array) {
    return call_.Write(RequireChannels(array)), array.data;
  }

  const bool* ReadMask(const std::optional<Array>& mask) {
    if (!mask) return nullptr;
    RequireElement(*mask, {Element::kBool}, "bool");
    if (!last_) {
      throw py::value_error("mask must be None unless channels are x's last axis; x has shape " +
                            ShapeText(x_.shape));
    }
    RequireShape(*mask, {x_.shape.begin(), x_.shape.end() - 1}, ", that of x without its channels");
    call_.Read(*mask);
    return Flags(&*mask);
  }

 private:
  std::int64_t Axes() const { return static_cast<std::int64_t>(x_.shape.size()); }

  const Array& RequireLike(const Array& array) const {
    if (ToDType(array) != dtype_) {
      throw py::type_error(array.name.str() + " has dtype " + DTypeText(array) +
                           "; it must be that of x, " + DTypeText(x_));
    }
    RequireShape(array, x_.shape, ", that of x");
    return array;
  }

  const Array& RequireChannels(const Array& array) const {
    const bool wide = StatisticsType(dtype_) == DType::kFloat64;
    RequireElement(
        array, {wide ? Element::kFloat64 : Element::kFloat32},
        wide ? "float64, for x of float64" : "float32, for x of another dtype than float64");
    RequireShape(array, {shape_.channels}, ", a value for each channel of x");
    return array;
  }

  const Array& x_;
  const BatchNormShape shape_;
  const DType dtype_;
  bool last_;
  Call& call_;
};

std::int64_t* ToCount(const Array& array) {
  RequireElement(array, {Element::kInt64}, "int64");
  RequireOneElement(array);
  return reinterpret_cast<std::int64_t*>(array.data);
}

void Forward(py::handle x, py::handle gamma, py::handle beta, py::handle y, py::handle count,
             py::handle mean, py::handle rest, py::handle variance, py::handle inverse,
             std::int64_t axis, py::handle epsilon, py::handle mask, py::handle workspace,
             py::handle threads, std::uintptr_t stream) {
  const Array source = ToArray(x, {"x"}), target = ToArray(y, {"y"});
  const Array scale = ToArray(gamma, {"gamma"}), offset = ToArray(beta, {"beta"});
  const Array number = ToArray(count, {"count"}), means = ToArray(mean, {"mean"});
  const Array rests = ToArray(rest, {"rest"}), variances = ToArray(variance, {"variance"});
  const Array inverses = ToArray(inverse, {"inverse"});
  const std::optional<Array> places = ToOptionalArray(mask, "mask");
  const Workspace memory(workspace);
  Call call(threads, stream);
  Arguments arguments(source, axis, call);
  BatchNormForward args = {};
  args.shape = arguments.shape();
  args.dtype = arguments.dtype();
  args.epsilon = ToMagnitude(epsilon, "epsilon");
  args.x = source.data;
  args.gamma = arguments.ReadChannels(scale);
  args.beta = arguments.ReadChannels(offset);
  args.mask = arguments.ReadMask(places);
  args.y = arguments.WriteLike(target);
  args.statistics = {arguments.WriteChannels(means), arguments.WriteChannels(rests),
                     arguments.WriteChannels(variances), arguments.WriteChannels(inverses)};
  args.count = ToCount(number);
  call.Write(number);
  memory.AddTo(call);
  call.Run([&](Executor& executor) { BatchNormForwardCpu(args, executor); },
           [&](auto& on) {
             const std::int64_t bytes = BatchNormWorkspaceCuda(args.shape, args.dtype);
             return BatchNormForwardCuda(args, memory.Place(on, bytes), on.stream());
           });
}

void Gradient(py::handle x, py::handle dy, py::handle gamma, py::handle mean, py::handle rest,
              py::handle inverse, py::handle count, py::handle dx, py::handle dgamma,
              py::handle dbeta, std::int64_t axis, py::handle mask, py::handle workspace,
              py::handle threads, std::uintptr_t stream) {
  const Array source = ToArray(x, {"x"}), incoming = ToArray(dy, {"dy"});
  const Array scale = ToArray(gamma, {"gamma"}), means = ToArray(mean, {"mean"});
  const Array rests = ToArray(rest, {"rest"}), inverses = ToArray(inverse, {"inverse"});
  const std::optional<Array> number = ToOptionalArray(count, "count");
  const Array target = ToArray(dx, {"dx"});
  const Array of_gamma = ToArray(dgamma, {"dgamma"}), of_beta = ToArray(dbeta, {"dbeta"});
  const std::optional<Array> places = ToOptionalArray(mask, "mask");
  const Workspace memory(workspace);
  Call call(threads, stream);
  Arguments arguments(source, axis, call);
  BatchNormGradient args = {};
  args.shape = arguments.shape();
  args.dtype = arguments.dtype();
  args.x = source.data;
  args.dy = arguments.ReadLike(incoming);
  args.gamma = arguments.ReadChannels(scale);
  args.statistics = {arguments.ReadChannels(means), arguments.ReadChannels(rests), nullptr,
                     arguments.ReadChannels(inverses)};
  args.mask = arguments.ReadMask(places);
  if (number) {
    args.count = ToCount(*number);
    call.Read(*number);
  }
  args.dx = arguments.WriteLike(target);
  args.dgamma = arguments.WriteChannels(of_gamma);
  args.dbeta = arguments.WriteChannels(of_beta);
  memory.AddTo(call);
  call.Run([&](Executor& executor) { BatchNormGradientCpu(args, executor); },
           [&](auto& on) {
             const std::int64_t bytes = BatchNormWorkspaceCuda(args.shape, args.dtype);
             return BatchNormGradientCuda(args, memory.Place(on, bytes), on.stream());
           });
}

void Inference(py::handle x, py::handle gamma, py::handle beta, py::handle mean,
               py::handle variance, py::handle y, std::int64_t axis, py::handle epsilon,
               py::handle threads, std::uintptr_t stream) {
  const Array source = ToArray(x, {"x"}), target = ToArray(y, {"y"});
  const Array scale = ToArray(gamma, {"gamma"}), offset = ToArray(beta, {"beta"});
  const Array means = ToArray(mean, {"mean"}), variances = ToArray(variance, {"variance"});
  Call call(threads, stream);
  Arguments arguments(source, axis, call);
  BatchNormInference args = {};
  args.shape = arguments.shape();
  args.dtype = arguments.dtype();
  args.epsilon = ToMagnitude(epsilon, "epsilon");
  args.x = source.data;
  args.gamma = arguments.ReadChannels(scale);
  args.beta = arguments.ReadChannels(offset);
  args.mean = arguments.ReadChannels(means);
  args.variance = arguments.ReadChannels(variances);
  args.y = arguments.WriteLike(target);
  call.Run([&](Executor& executor) { BatchNormInferenceCpu(args, executor); },
           [&](auto& on) { return BatchNormInferenceCuda(args, on.stream()); });
}

std::int64_t WorkspaceBytes(py::handle x, std::int64_t axis) {
  const Array source = ToArray(x, {"x"});
  const BatchNormShape shape = ToShape(source, axis);
  const DType dtype = ToDType(source);
#if defined(ACCUMOPS_CUDA)
  return BatchNormWorkspaceCuda(shape, dtype);
#else
  return (void)shape, (void)dtype, 0;
#endif
}

constexpr char kForwardDoc[] =
    R"(batch_norm(x, gamma, beta, *, y, count, mean, rest, variance, inverse, axis=-1, epsilon=1e-3, mask=None, workspace=None, threads=None, stream=0)
--

Batch normalization as in training: y = (x - mean) * inverse * gamma + beta, with x's own moments.

The same input gives the same bits on every run and with any number of threads.

Args:
    x: C-contiguous array of float16, bfloat16 (or its bits as uint16), float32 or float64. It must
        have channels, and may have no values.
    gamma, beta: Arrays of a value for each channel: float32, or float64 for x of float64.
    y: Writable array like x, which it must not share memory with.
    count: Writable array of one int64: how many values of a channel the moments are of.
    mean, rest, variance, inverse: Writable arrays like gamma: the mean is mean + rest, where rest
        is what rounding left; the biased variance; 1 / sqrt(variance + epsilon).
    axis: The axis of the channels.
    epsilon: A number, finite and not negative.
    mask: None, or an array of bool, of x's shape without the channels, which are last then: the
        moments are of those places where it is True.
    workspace: None, or CUDA memory to work in, of batch_norm_workspace() bytes and aligned to 256:
        any writable array. It is allocated in stream order where there is none.
    threads, stream: As in accumulate().

Raises:
    TypeError, ValueError, RuntimeError: As accumulate().)";

constexpr char kGradientDoc[] =
    R"(batch_norm_gradient(x, dy, gamma, *, mean, rest, inverse, count, dx, dgamma, dbeta, axis=-1, mask=None, workspace=None, threads=None, stream=0)
--

The gradient of batch_norm(), or of batch_norm_inference().

Args:
    x, gamma, axis, mask, workspace, threads, stream: As in batch_norm().
    dy: Array like x: the gradient with respect to y.
    mean, rest, inverse, count: What batch_norm() wrote. Without a count, None, the moments do not
        depend on x: the gradient of inference.
    dx: Writable array like x, which shares memory with neither x nor dy.
    dgamma, dbeta: Writable arrays like gamma.

Raises:
    TypeError, ValueError, RuntimeError: As accumulate().)";

constexpr char kInferenceDoc[] =
    R"(batch_norm_inference(x, gamma, beta, mean, variance, *, y, axis=-1, epsilon=1e-3, threads=None, stream=0)
--

Batch normalization with moments that are given: arrays like gamma. The rest as in batch_norm().

Raises:
    TypeError, ValueError, RuntimeError: As accumulate().)";

constexpr char kWorkspaceDoc[] = R"(batch_norm_workspace(x, axis=-1)
--

The bytes of CUDA memory that batch_norm() of such an array, or its gradient, works in; 0 in a build
without CUDA.)";

}  // namespace

void BindBatchNorm(py::module_& module) {
  using py::literals::operator""_a;
  const py::none none;
  module.def("batch_norm", Forward, kForwardDoc, "x"_a, "gamma"_a, "beta"_a, py::kw_only(), "y"_a,
             "count"_a, "mean"_a, "rest"_a, "variance"_a, "inverse"_a, "axis"_a = -1,
             "epsilon"_a = 1e-3, "mask"_a = none, "workspace"_a = none, "threads"_a = none,
             "stream"_a = 0);
  module.def("batch_norm_gradient", Gradient, kGradientDoc, "x"_a, "dy"_a, "gamma"_a, py::kw_only(),
             "mean"_a, "rest"_a, "inverse"_a, "count"_a, "dx"_a, "dgamma"_a, "dbeta"_a,
             "axis"_a = -1, "mask"_a = none, "workspace"_a = none, "threads"_a = none,
             "stream"_a = 0);
  module.def("batch_norm_inference", Inference, kInferenceDoc, "x"_a, "gamma"_a, "beta"_a, "mean"_a,
             "variance"_a, py::kw_only(), "y"_a, "axis"_a = -1, "epsilon"_a = 1e-3,
             "threads"_a = none, "stream"_a = 0);
  module.def("batch_norm_workspace", WorkspaceBytes, kWorkspaceDoc, "x"_a, "axis"_a = -1);
}

}  // namespace accumops
