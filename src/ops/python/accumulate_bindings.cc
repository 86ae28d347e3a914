// accumulate() and accumulate_rows().
#include <optional>
#include <string>
#include <vector>

#include "accumulate.h"
#include "accumulate_rows.h"
#include "bindings.h"
#include "call.h"

namespace accumops {
namespace {

// The arguments that accumulate() and accumulate_rows() share.
struct Options {
  Scalar scale;
  Flag overwrite;
  std::optional<Array> all_finite;

  Options(py::handle scale_object, py::handle overwrite_object, py::handle all_finite_object)
      : scale(scale_object, "scale", {Element::kFloat32, Element::kFloat64}, "float32 or float64"),
        overwrite(overwrite_object, "overwrite"),
        all_finite(ToAllFinite(all_finite_object)) {}

  void AddTo(Call& call) const {
    if (all_finite) call.Write(*all_finite);
    call.ReadScalar(scale.array);
    call.ReadScalar(overwrite.array);
  }

  bool* finite() const { return Flags(Pointer(all_finite)); }

  // The scalars in device memory: the arrays' own, or a copy of the host's values.
  struct Placed {
    DeviceScalar scale;
    const bool* overwrite;
  };
  template <typename On>
  Placed Place(On& on) const {
    struct Values {
      double scale;
      bool overwrite;
    };
    Placed placed = {};
    if (!scale.array || !overwrite.array) {
      const Values* values = on.Upload(Values{scale.value, overwrite.value}, "scale and overwrite");
      placed = {{&values->scale, DType::kFloat64}, &values->overwrite};
    }
    if (scale.array) placed.scale = {scale.array->data, ToDType(*scale.array)};
    if (overwrite.array) placed.overwrite = Flags(&*overwrite.array);
    return placed;
  }
};

void Accumulate(py::handle accumulators, py::handle gradients, py::handle scale,
                py::handle overwrite, py::handle all_finite, py::handle squared_norms,
                py::handle threads, std::uintptr_t stream) {
  const std::vector<Array> targets = ToArrays(accumulators, "accumulators");
  const std::vector<Array> sources = ToArrays(gradients, "gradients");
  if (targets.size() != sources.size()) {
    throw py::value_error("accumulators has " + std::to_string(targets.size()) +
                          " items and gradients has " + std::to_string(sources.size()) +
                          "; each accumulator needs one gradient");
  }
  const Options options(scale, overwrite, all_finite);
  const std::optional<Array> norms = ToOptionalArray(squared_norms, "squared_norms");
  Call call(threads, stream);
  std::vector<AccumulateItem> items;
  items.reserve(targets.size());
  for (std::size_t i = 0; i < targets.size(); ++i) {
    const Array& target = targets[i];
    const Array& source = sources[i];
    const DType target_dtype = AccumulatorDType(target);
    const DType source_dtype = GradientDType(source, target);
    if (source.shape != target.shape) {
      RequireShape(source, target.shape, ", that of " + target.name.str());
    }
    call.Write(target);
    call.Read(source);
    items.push_back({target.data, source.data, target.size, target_dtype, source_dtype});
  }
  AccumulateReport report;
  report.all_finite = options.finite();
  if (norms) {
    RequireElement(*norms, {Element::kFloat64}, "float64");
    RequireShape(*norms, {2, static_cast<std::int64_t>(items.size())},
                 ": two for each of accumulators");
    call.Write(*norms);
    report.squared_norms = reinterpret_cast<double*>(norms->data);
  }
  options.AddTo(call);
  call.Run(
      [&](Executor& executor) {
        AccumulateCpu(items.data(), items.size(), options.scale.value, options.overwrite.value,
                      report, executor);
      },
      [&](auto& on) {
        const Options::Placed placed = options.Place(on);
        void* const workspace =
            norms ? on.Allocate(AccumulateNormsWorkspace(items.data(), items.size())) : nullptr;
        return AccumulateCuda(items.data(), items.size(), placed.scale, placed.overwrite, report,
                              workspace, on.stream());
      });
}

void AccumulateRows(py::handle accumulator, py::handle values, py::handle indices,
                    py::handle touched_rows, py::handle scale, py::handle overwrite,
                    py::handle all_finite, py::handle threads, std::uintptr_t stream) {
  const Array target = ToArray(accumulator, {"accumulator"});
  const Array source = ToArray(values, {"values"});
  const Array positions = ToArray(indices, {"indices"});
  const std::optional<Array> touched = ToOptionalArray(touched_rows, "touched_rows");
  const Options options(scale, overwrite, all_finite);
  Call call(threads, stream);

  const DType target_dtype = AccumulatorDType(target);
  const DType source_dtype = GradientDType(source, target);
  RequireElement(positions, {Element::kInt32, Element::kInt64}, "int32 or int64");
  if (target.shape.empty()) {
    throw py::value_error("accumulator has shape (); it must have at least one axis, its rows");
  }
  if (positions.shape.size() != 1) {
    throw py::value_error("indices has shape " + ShapeText(positions.shape) +
                          "; it must have one axis, a row's index for each of values");
  }
  std::vector<std::int64_t> expected = target.shape;
  expected[0] = positions.size;
  RequireShape(source, expected,
               ": a row of accumulator, of shape " + ShapeText(target.shape) +
                   ", for each of the " + std::to_string(positions.size) + " indices");
  if (touched) {
    RequireElement(*touched, {Element::kBool}, "bool");
    RequireShape(*touched, {target.shape[0]}, ": a flag for each row of accumulator");
    call.Write(*touched);
  }
  call.Write(target);
  call.Read(source);
  call.Read(positions);
  options.AddTo(call);

  const std::int64_t rows = target.shape[0];
  std::int64_t columns = 1;
  for (std::size_t i = 1; i < target.shape.size(); ++i) columns *= target.shape[i];
  const bool wide = positions.element == Element::kInt64;
  const AccumulateRowsItem item = {
      target.data,  source.data, positions.data, Flags(Pointer(touched)),
      rows,         columns,     positions.size, target_dtype,
      source_dtype, wide};
  call.Run(
      [&](Executor& executor) {
        const std::int64_t bad = FindBadIndex(item.indices, wide, item.count, rows);
        if (bad >= 0) {
          const std::int64_t index = wide ? static_cast<const std::int64_t*>(item.indices)[bad]
                                          : static_cast<const std::int32_t*>(item.indices)[bad];
          throw py::index_error("indices[" + std::to_string(bad) + "] is " + std::to_string(index) +
                                "; it must be at least 0 and less than accumulator's " +
                                std::to_string(rows) + " rows");
        }
        AccumulateRowsCpu(item, options.scale.value, options.overwrite.value, options.finite(),
                          executor);
      },
      [&](auto& on) {
        const Options::Placed placed = options.Place(on);
        return AccumulateRowsCuda(item, placed.scale, placed.overwrite, options.finite(),
                                  on.stream());
      });
}

// The first line of each is what inspect.signature() reads.
constexpr char kAccumulateDoc[] =
    R"(accumulate(accumulators, gradients, *, scale=1.0, overwrite=False, all_finite=None, squared_norms=None, threads=None, stream=0)
--

Adds scale * gradient to each accumulator, in place; all of them in one pass.

Product and sum are rounded separately in the accumulator's type, so the result is that of
`acc + acc.dtype.type(scale) * gradient.astype(acc.dtype)` bit for bit, on every device and with any
number of threads. A call that raises has written nothing.

Args:
    accumulators: Sequence of writable, C-contiguous arrays of float32 or float64.
    gradients: As many C-contiguous arrays of the same shapes: float16, bfloat16, float32 or
        float64 (the last for float64 accumulators only). bfloat16 is that of ml_dtypes, or uint16
        that holds its bits, as neither NumPy nor CuPy has the type. None may share memory with an
        accumulator.
    scale: A number. For CUDA arrays also a one-element device array of float32 or float64, which
        the kernel reads. A scale of 0 adds nothing, whatever the gradients hold: the accumulators
        keep their bits, or are 0 with `overwrite`.
    overwrite: Whether accumulators are written without being read: `acc = scale * gradient`. A
        bool, or for CUDA arrays a one-element device array of bool.
    all_finite: None, or a one-element array of bool, which is set to False if a gradient holds Inf
        or NaN. It is never set to True.
    squared_norms: None, or a writable array of float64 of shape [2, len(accumulators)], for the sum
        of squares of each gradient, as it is given, and of each accumulator, as the call leaves it,
        to about 1e-6 of itself. It is finite exactly if all values are.
        The same input at the same alignment gives the same bits on every run, and with any number
        of threads.
    threads: How many threads to use at most; None for one on each processor. Ignored for CUDA.
    stream: The CUDA stream to run on, as a number; 0 is the default stream. Ignored for host
        arrays. Work on the streams that the arrays' interfaces name is waited for, and waits.

Arrays are NumPy's, what NumPy can view without a copy, or objects with `__cuda_array_interface__`;
all of one call lie in host memory or all on one GPU. No other thread may change them meanwhile.

Raises:
    TypeError: An argument is no array, or of a wrong dtype.
    ValueError: Shapes, lengths, memory layout or placement do not fit.
    RuntimeError: CUDA reported an error, or this build has no CUDA kernels.)";

constexpr char kAccumulateRowsDoc[] =
    R"(accumulate_rows(accumulator, values, indices, *, touched_rows=None, scale=1.0, overwrite=False, all_finite=None, threads=None, stream=0)
--

Adds scale * values[i] to accumulator[indices[i]], in place, for i = 0, 1, … in this order.

Duplicate indices add up, in the order in which they stand, with any number of threads.

Args:
    accumulator: Writable array of shape [rows, ...], float32 or float64.
    values: Array of shape [count, ...], with the accumulator's other axes.
    indices: Array of shape [count], int32 or int64. On a GPU a row that does not exist is skipped.
    touched_rows: None, or a writable array of bool of shape [rows]. The rows that are added to are
        marked True; with a scale of 0 none is. `overwrite` then clears the marked rows only, and their marks, and relies on
        every other row being zero.
    scale, all_finite, threads, stream: As in accumulate().
    overwrite: Whether the accumulator is cleared first.

Raises:
    IndexError: An index of host arrays is not that of a row. Nothing has been written.
    TypeError, ValueError, RuntimeError: As accumulate().)";

}  // namespace

void BindAccumulate(py::module_& module) {
  using py::literals::operator""_a;
  const py::none none;
  module.def("accumulate", Accumulate, kAccumulateDoc, "accumulators"_a, "gradients"_a,
             py::kw_only(), "scale"_a = 1.0, "overwrite"_a = false, "all_finite"_a = none,
             "squared_norms"_a = none, "threads"_a = none, "stream"_a = 0);
  module.def("accumulate_rows", AccumulateRows, kAccumulateRowsDoc, "accumulator"_a, "values"_a,
             "indices"_a, py::kw_only(), "touched_rows"_a = none, "scale"_a = 1.0,
             "overwrite"_a = false, "all_finite"_a = none, "threads"_a = none, "stream"_a = 0);
}

}  // namespace accumops
