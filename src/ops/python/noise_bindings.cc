// add_noise_group() and end_noise_window().
#include <string>
#include <vector>

#include "bindings.h"
#include "call.h"
#include "noise.h"

namespace accumops {
namespace {

// An array of float64, or of int64, and of one shape.
const Array& Require(const Array& array, Element element, const std::vector<std::int64_t>& shape,
                     const char* contents) {
  RequireElement(array, {element}, element == Element::kInt64 ? "int64" : "float64");
  RequireShape(array, shape, contents);
  return array;
}

double* Doubles(const Array& array) { return reinterpret_cast<double*>(array.data); }

void AddNoiseGroup(py::handle window, py::handle norms, py::handle share, py::handle starts,
                   std::uintptr_t stream) {
  const Array sums = ToArray(window, {"window"}), report = ToArray(norms, {"norms"});
  const Scalar weight(share, "share", {Element::kFloat32, Element::kFloat64}, "float32 or float64");
  const Flag first(starts, "starts");
  Require(sums, Element::kFloat64, {NoiseWindow::kSize}, ": the sums of an open window");
  const std::int64_t count = report.shape.size() == 2 ? report.shape[1] : 0;
  Require(report, Element::kFloat64, {2, count}, ": of each gradient, and of each sum");
  Call call(py::int_(1), stream);
  call.Write(sums);
  call.Read(report);
  call.ReadScalar(weight.array);
  call.ReadScalar(first.array);
  const auto gradients = static_cast<std::size_t>(count);
  call.Run(
      [&](Executor&) {
        AddNoiseGroupCpu(Doubles(report), gradients, weight.value, first.value, Doubles(sums));
      },
      [&](auto& on) {
        struct Values {
          double share;
          bool starts;
        };
        DeviceScalar placed = {};
        const bool* flag = Flags(Pointer(first.array));
        if (!weight.array || !first.array) {
          const Values* values = on.Upload(Values{weight.value, first.value}, "share and starts");
          placed = {&values->share, DType::kFloat64};
          if (!first.array) flag = &values->starts;
        }
        if (weight.array) placed = {weight.array->data, ToDType(*weight.array)};
        return AddNoiseGroupCuda(Doubles(report), gradients, placed, flag, Doubles(sums),
                                 on.stream());
      });
}

void EndNoiseWindow(py::handle window, py::handle statistics, py::handle shares, py::handle steps,
                    py::handle decay, py::handle scale, py::handle applies, std::uintptr_t stream) {
  const Array sums = ToArray(window, {"window"});
  const std::vector<Array> kept = ToArrays(statistics, "statistics");
  RequireLength("statistics", kept.size(), 3, ": averages, norm and ended");
  const Scalar total(shares, "shares", {Element::kFloat32, Element::kFloat64},
                     "float32 or float64");
  const Scalar factor(scale, "scale", {Element::kFloat64}, "float64");
  const Flag updates(applies, "applies");
  if (!PyIndex_Check(steps.ptr())) WrongType("steps", "a whole number", steps);
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(steps.ptr()));
  if (!number) throw py::error_already_set();
  const std::int64_t count = PyLong_AsLongLong(number.ptr());
  if (count == -1 && PyErr_Occurred()) throw py::error_already_set();
  NoiseEnding ending = {total.value, factor.value, updates.value, count, ToNumber(decay, "decay")};
  Require(sums, Element::kFloat64, {NoiseWindow::kSize}, ": the sums of a window");
  Require(kept[0], Element::kFloat64, {NoiseStatistics::kAverages}, ": the averages");
  Require(kept[1], Element::kFloat64, {1}, ": the norm of a window's gradient");
  Require(kept[2], Element::kInt64, {NoiseStatistics::kEnded}, ": windows and micro-batches");
  Call call(py::int_(1), stream);
  for (const Array& array : kept) call.Write(array);
  call.Read(sums);
  for (const auto* scalar : {&total.array, &factor.array, &updates.array}) call.ReadScalar(*scalar);
  const NoiseStatistics into = {Doubles(kept[0]), Doubles(kept[1]),
                                reinterpret_cast<std::int64_t*>(kept[2].data)};
  call.Run([&](Executor&) { EndNoiseWindowCpu(Doubles(sums), ending, into); },
           [&](auto& on) {
             DeviceScalar placed = {};
             const double* unscale = nullptr;
             const bool* flag = Flags(Pointer(updates.array));
             if (!total.array || !factor.array || !updates.array) {
               const NoiseEnding* values = on.Upload(ending, "shares, scale and applies");
               placed = {&values->shares, DType::kFloat64};
               unscale = &values->scale;
               if (!updates.array) flag = &values->applies;
             }
             if (total.array) placed = {total.array->data, ToDType(*total.array)};
             if (factor.array) unscale = Doubles(*factor.array);
             return EndNoiseWindowCuda(Doubles(sums), ending, placed, unscale, flag, into,
                                       on.stream());
           });
}

constexpr char kAddNoiseGroupDoc[] =
    R"(add_noise_group(window, norms, *, share, starts=False, stream=0)
--

Adds what a micro-batch tells of the gradient's noise to what is known of its window, in place.

Args:
    window: A writable array of float64, of shape [4]: shares times squared norms of gradients,
        micro-batches with a share, the squared norm of the sums, and the sum of all shares.
    norms: An array of float64, of shape [2, gradients], as accumulate() reports it.
    share: What the micro-batch counts for. A number, or for CUDA arrays a one-element device array
        of float32 or float64.
    starts: Whether it is the first of its window. A bool, or for CUDA arrays a one-element device
        array of bool.
    stream: As in accumulate().

Raises:
    TypeError, ValueError, RuntimeError: As accumulate().)";

constexpr char kEndNoiseWindowDoc[] =
    R"(end_noise_window(window, statistics, *, shares, steps, decay, scale=1.0, applies=True, stream=0)
--

Takes a window that ends into the averages of the gradient's noise, in place.

Args:
    window: An array as add_noise_group() writes it.
    statistics: Three writable arrays: float64 of shape [3], the averages of the trace, of the
        square and of 1; float64 of shape [1], the norm of the last window's gradient; and int64 of
        shape [2], the numbers of windows and micro-batches.
    shares: The sum of the micro-batches' shares. As `share` of add_noise_group().
    steps: How many micro-batches the window has: an int.
    decay: What is left of the averages: a number.
    scale: A factor that the gradients have. A number, or for CUDA arrays a one-element device array
        of float64.
    applies: Whether the window makes an update. As `starts` of add_noise_group().
    stream: As in accumulate().

Raises:
    TypeError, ValueError, RuntimeError: As accumulate().)";

}  // namespace

void BindNoise(py::module_& module) {
  using py::literals::operator""_a;
  module.def("add_noise_group", AddNoiseGroup, kAddNoiseGroupDoc, "window"_a, "norms"_a,
             py::kw_only(), "share"_a, "starts"_a = false, "stream"_a = 0);
  module.def("end_noise_window", EndNoiseWindow, kEndNoiseWindowDoc, "window"_a, "statistics"_a,
             py::kw_only(), "shares"_a, "steps"_a, "decay"_a, "scale"_a = 1.0, "applies"_a = true,
             "stream"_a = 0);
}

}  // namespace accumops
