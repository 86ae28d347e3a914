// accumops.ops._kernels: the kernels' launchers on arrays. Without TensorFlow, so that they can be
// tested and timed alone.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "accumulate.h"
#include "accumulate_rows.h"
#include "array.h"
#include "memory_bandwidth.h"
#include "span.h"
#include "thread_pool.h"

#if defined(ACCUMOPS_CUDA)
#include "cuda_call.h"
#endif

namespace accumops {
namespace {

template <typename Body>
void WithoutGil(const Body& body) {
  PyThreadState* const state = PyEval_SaveThread();
  std::exception_ptr exception;
  try {
    body();
  } catch (...) {
    exception = std::current_exception();
  }
  try {
    PyEval_RestoreThread(state);
  } catch (...) {
    // The interpreter is exiting, and CPython before 3.14 ends a daemon thread that comes back by
    // unwinding its stack. The destructors in it would use Python without the GIL: stay here.
    for (;;) pause();
  }
  if (exception) std::rethrow_exception(exception);
}

int ThreadCount(py::handle threads) {
  if (threads.is_none()) return AvailableThreads();
  const Py_ssize_t count = PyIndex_Check(threads.ptr())
                               ? PyNumber_AsSsize_t(threads.ptr(), nullptr)  // clips
                               : 0;
  if (PyErr_Occurred()) throw py::error_already_set();
  if (count >= 1) {
    return static_cast<int>(std::min<Py_ssize_t>(count, std::numeric_limits<int>::max()));
  }
  const std::string message =
      "threads must be None or an int of at least 1, got " + py::repr(threads).cast<std::string>();
  if (!PyIndex_Check(threads.ptr())) throw py::type_error(message);
  throw py::value_error(message);
}

[[noreturn]] void WrongType(const char* argument, const char* expected, py::handle got) {
  throw py::type_error(std::string(argument) + " must be " + expected + ", got " +
                       py::str(py::type::of(got).attr("__name__")).cast<std::string>());
}

// A scalar of the call: a number, or for CUDA arrays one element of device memory.
struct Scale {
  double value = 1.0;
  std::optional<Array> array;

  explicit Scale(py::handle object) {
    if (HasCudaInterface(object)) {
      array = ToArray(object, {"scale"});
      RequireElement(*array, {Element::kFloat32, Element::kFloat64}, "float32 or float64");
      RequireOneElement(*array);
      RequireContiguous(*array);
      return;
    }
    value = PyFloat_AsDouble(object.ptr());
    if (!PyErr_Occurred()) return;
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
    WrongType("scale", "a number, or for CUDA arrays a one-element device array", object);
  }
};

struct Overwrite {
  bool value = false;
  std::optional<Array> array;

  explicit Overwrite(py::handle object) {
    if (PyBool_Check(object.ptr())) {
      value = object.is(py::handle(Py_True));
      return;
    }
    if (!HasCudaInterface(object) && !PyObject_CheckBuffer(object.ptr())) {
      WrongType("overwrite", "a bool, or for CUDA arrays a one-element device array of bool",
                object);
    }
    Array found = ToArray(object, {"overwrite"});  // also NumPy's own bool
    RequireElement(found, {Element::kBool}, "bool");
    RequireOneElement(found);
    if (found.on_device) {
      array = std::move(found);
    } else {
      value = *found.data != 0;
    }
  }
};

std::optional<Array> ToAllFinite(py::handle object) {
  std::optional<Array> array = ToOptionalArray(object, "all_finite");
  if (array) {
    RequireElement(*array, {Element::kBool}, "bool");
    RequireOneElement(*array);
    RequireWritable(*array);
  }
  return array;
}

const Array* Pointer(const std::optional<Array>& array) { return array ? &*array : nullptr; }

bool* Flags(const std::optional<Array>& array) {
  return array ? reinterpret_cast<bool*>(array->data) : nullptr;
}

// One call of a kernel that adds to accumulators: its arguments other than the arrays it adds.
class Call {
 public:
  Call(py::handle scale, py::handle overwrite, py::handle all_finite, py::handle threads,
       std::uintptr_t stream)
      : scale_(scale),
        overwrite_(overwrite),
        all_finite_(ToAllFinite(all_finite)),
        threads_(ThreadCount(threads)),
        stream_(stream) {}

  // Checks what concerns all arrays together and runs cpu(scale, overwrite, all_finite, executor)
  // or cuda(scale, overwrite, all_finite, stream). `cuda` is generic: a build without CUDA does not
  // instantiate it.
  template <typename Cpu, typename Cuda>
  void Run(std::vector<const Array*> written, std::vector<const Array*> read, const Cpu& cpu,
           const Cuda& cuda) const {
    if (all_finite_) written.push_back(&*all_finite_);
    for (const Array* array : {Pointer(scale_.array), Pointer(overwrite_.array)}) {
      if (array != nullptr) read.push_back(array);
    }
    std::vector<const Array*> all = written;
    all.insert(all.end(), read.begin(), read.end());
    for (const Array* array : all) RequireSameSide(*array, *all.front());
    RejectOverlaps(written, read);
    if (all.empty() || !all.front()->on_device) {
      PoolExecutor executor(threads_);
      WithoutGil([&] { cpu(scale_.value, overwrite_.value, Flags(all_finite_), executor); });
      return;
    }
#if defined(ACCUMOPS_CUDA)
    WithoutGil([&] {
      CudaCall call(all, stream_);
      call.Start(all);
      const auto scalars = call.Place(Pointer(scale_.array), scale_.value,
                                      Pointer(overwrite_.array), overwrite_.value);
      const char* error = cuda(scalars.scale, scalars.overwrite, Flags(all_finite_), call.stream());
      if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
      call.Finish();
    });
#else
    (void)cuda, (void)stream_;
    throw std::runtime_error(all.front()->name.str() +
                             " is in CUDA memory, but this build of accumops has no CUDA kernels; "
                             "pass NumPy arrays, or build where nvcc is installed");
#endif
  }

 private:
  Scale scale_;
  Overwrite overwrite_;
  std::optional<Array> all_finite_;
  int threads_;
  std::uintptr_t stream_;
};

void Accumulate(py::handle accumulators, py::handle gradients, py::handle scale,
                py::handle overwrite, py::handle all_finite, py::handle threads,
                std::uintptr_t stream) {
  const std::vector<Array> targets = ToArrays(accumulators, "accumulators");
  const std::vector<Array> sources = ToArrays(gradients, "gradients");
  if (targets.size() != sources.size()) {
    throw py::value_error("accumulators has " + std::to_string(targets.size()) +
                          " items and gradients has " + std::to_string(sources.size()) +
                          "; each accumulator needs one gradient");
  }
  const Call call(scale, overwrite, all_finite, threads, stream);
  std::vector<AccumulateItem> items;
  std::vector<const Array*> written, read;
  items.reserve(targets.size());
  for (std::size_t i = 0; i < targets.size(); ++i) {
    const Array& target = targets[i];
    const Array& source = sources[i];
    const DType target_dtype = AccumulatorDType(target);
    const DType source_dtype = GradientDType(source, target);
    if (source.shape != target.shape) {
      RequireShape(source, target.shape, ", that of " + target.name.str());
    }
    RequireContiguous(target);
    RequireWritable(target);
    RequireContiguous(source);
    items.push_back({target.data, source.data, target.size, target_dtype, source_dtype});
    written.push_back(&target);
    read.push_back(&source);
  }
  call.Run(
      std::move(written), std::move(read),
      [&](double factor, bool clear, bool* finite, Executor& executor) {
        AccumulateCpu(items.data(), items.size(), factor, clear, finite, executor);
      },
      [&](const DeviceScalar& factor, const bool* clear, bool* finite, auto* on) {
        return AccumulateCuda(items.data(), items.size(), factor, clear, finite, on);
      });
}

void AccumulateRows(py::handle accumulator, py::handle values, py::handle indices,
                    py::handle touched_rows, py::handle scale, py::handle overwrite,
                    py::handle all_finite, py::handle threads, std::uintptr_t stream) {
  const Array target = ToArray(accumulator, {"accumulator"});
  const Array source = ToArray(values, {"values"});
  const Array positions = ToArray(indices, {"indices"});
  const std::optional<Array> touched = ToOptionalArray(touched_rows, "touched_rows");
  const Call call(scale, overwrite, all_finite, threads, stream);

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
  std::vector<const Array*> written = {&target};
  if (touched) {
    RequireElement(*touched, {Element::kBool}, "bool");
    RequireShape(*touched, {target.shape[0]}, ": a flag for each row of accumulator");
    RequireContiguous(*touched);
    RequireWritable(*touched);
    written.push_back(&*touched);
  }
  RequireContiguous(target);
  RequireWritable(target);
  RequireContiguous(source);
  RequireContiguous(positions);

  const std::int64_t rows = target.shape[0];
  std::int64_t columns = 1;
  for (std::size_t i = 1; i < target.shape.size(); ++i) columns *= target.shape[i];
  const bool wide = positions.element == Element::kInt64;
  const AccumulateRowsItem item = {target.data,  source.data, positions.data, Flags(touched),
                                   rows,         columns,     positions.size, target_dtype,
                                   source_dtype, wide};
  call.Run(
      std::move(written), {&source, &positions},
      [&](double factor, bool clear, bool* finite, Executor& executor) {
        const std::int64_t bad = FindBadIndex(item.indices, wide, item.count, rows);
        if (bad >= 0) {
          const std::int64_t index = wide ? static_cast<const std::int64_t*>(item.indices)[bad]
                                          : static_cast<const std::int32_t*>(item.indices)[bad];
          throw py::index_error("indices[" + std::to_string(bad) + "] is " + std::to_string(index) +
                                "; it must be at least 0 and less than accumulator's " +
                                std::to_string(rows) + " rows");
        }
        AccumulateRowsCpu(item, factor, clear, finite, executor);
      },
      [&](const DeviceScalar& factor, const bool* clear, bool* finite, auto* on) {
        return AccumulateRowsCuda(item, factor, clear, finite, on);
      });
}

void CallTriad(py::handle a, py::handle b, py::handle c, py::handle scale, py::handle threads,
               bool streaming) {
  const Array arrays[] = {ToArray(a, {"a"}), ToArray(b, {"b"}), ToArray(c, {"c"})};
  for (const Array& array : arrays) {
    if (array.on_device)
      throw py::value_error(array.name.str() +
                            " is in CUDA memory; triad "
                            "measures the host's, so pass NumPy arrays");
    RequireElement(array, {Element::kFloat32}, "float32");
    RequireShape(array, arrays[0].shape, ", that of a");
    RequireContiguous(array);
  }
  RequireWritable(arrays[0]);
  RejectOverlaps({&arrays[0]}, {&arrays[1], &arrays[2]});
  const auto values = [&](int i) { return reinterpret_cast<float*>(arrays[i].data); };
  const Scale factor(scale);
  if (factor.array) WrongType("scale", "a number", scale);
  PoolExecutor executor(ThreadCount(threads));
  WithoutGil([&] {
    Triad(values(0), values(1), values(2), static_cast<float>(factor.value), arrays[0].size,
          streaming, executor);
  });
}

py::dict CallMemoryBandwidth(py::handle threads, std::int64_t bytes_per_array, int repeats) {
  if (bytes_per_array < 4) {
    throw py::value_error("bytes_per_array must be at least 4, got " +
                          std::to_string(bytes_per_array));
  }
  if (repeats < 1) {
    throw py::value_error("repeats must be at least 1, got " + std::to_string(repeats));
  }
  PoolExecutor executor(ThreadCount(threads));
  MemoryBandwidth found{};
  WithoutGil([&] { found = MeasureMemoryBandwidth(bytes_per_array, repeats, executor); });
  py::dict result;
  result["best"] = std::max(found.plain, found.streaming);
  result["plain"] = found.plain;
  result["streaming"] = found.streaming;
  return result;
}

std::string InstructionSet() { return CurrentSpanFunctions().instruction_set; }

// Those that this processor and build run: found out by choosing each, once, at import.
const std::vector<std::string>& InstructionSets() {
  static const auto* const usable = [] {
    const std::string current = InstructionSet();
    auto* names = new std::vector<std::string>;
    for (const char* name : {"baseline", "avx2", "avx512"}) {
      if (UseInstructionSet(name)) names->push_back(name);
    }
    UseInstructionSet(current.c_str());
    return names;
  }();
  return *usable;
}

void ChooseInstructionSet(const std::string& name) {
  if (UseInstructionSet(name.c_str())) return;
  std::string usable;
  for (const std::string& each : InstructionSets())
    usable += (usable.empty() ? "'" : ", '") + each + "'";
  throw py::value_error("this processor and build have no instruction set '" + name +
                        "'; use one of " + usable);
}

py::dict CudaStatus() {
  int runtime = 0, driver = 0, devices = 0;
  std::string error;
#if defined(ACCUMOPS_CUDA)
  constexpr bool kBuilt = true;
  WithoutGil([&] {
    const auto note = [&](cudaError_t status) {
      if (status != cudaSuccess && error.empty()) error = cudaGetErrorString(status);
    };
    note(cudaRuntimeGetVersion(&runtime));
    note(cudaDriverGetVersion(&driver));
    const cudaError_t status = cudaGetDeviceCount(&devices);
    if (status != cudaSuccess) devices = 0;
    note(status);
    cudaGetLastError();  // the next call must not find it
  });
#else
  constexpr bool kBuilt = false;
  error = "this build of accumops has no CUDA kernels";
#endif
  py::dict result;
  result["built"] = kBuilt;
  result["runtime_version"] = runtime;
  result["driver_version"] = driver;
  result["device_count"] = devices;
  result["error"] = error.empty() ? py::object(py::none()) : py::str(error);
  return result;
}

py::dict BuildInfo() {
  py::dict result;
#if defined(__clang__)
  result["compiler"] = __VERSION__;
#else
  result["compiler"] = "GCC " __VERSION__;
#endif
#if defined(ACCUMOPS_CUDA)
  result["cuda_runtime_version"] = CUDART_VERSION;
#else
  result["cuda_runtime_version"] = py::none();
#endif
  result["instruction_sets"] = InstructionSets();
  return result;
}

// The first line of each is what inspect.signature() reads.
constexpr char kAccumulateDoc[] =
    R"(accumulate(accumulators, gradients, *, scale=1.0, overwrite=False, all_finite=None, threads=None, stream=0)
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
        the kernel reads.
    overwrite: Whether accumulators are written without being read: `acc = scale * gradient`. A
        bool, or for CUDA arrays a one-element device array of bool.
    all_finite: None, or a one-element array of bool, which is set to False if a gradient holds Inf
        or NaN. It is never set to True.
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
        marked True. `overwrite` then clears the marked rows only, and their marks, and relies on
        every other row being zero.
    scale, all_finite, threads, stream: As in accumulate().
    overwrite: Whether the accumulator is cleared first.

Raises:
    IndexError: An index of host arrays is not that of a row. Nothing has been written.
    TypeError, ValueError, RuntimeError: As accumulate().)";

constexpr char kInstructionSetsDoc[] = R"(instruction_sets()
--

The instruction sets, by name, that this processor and build can use; "baseline" is always one.)";

constexpr char kInstructionSetDoc[] = R"(instruction_set()
--

The instruction set in use: the widest there is, unless use_instruction_set() chose another.)";

constexpr char kUseInstructionSetDoc[] = R"(use_instruction_set(name)
--

Chooses an instruction set for all later calls of this process. All give the same bits.

Raises:
    ValueError: It is not one of instruction_sets().)";

constexpr char kTriadDoc[] = R"(triad(a, b, c, *, scale=1.0, threads=None, streaming=False)
--

a[:] = b + scale * c on float32 arrays of one shape: the yardstick for memory bandwidth.

Args:
    a: The array to write. It must not share memory with the others.
    b, c: The arrays to read.
    scale: A number.
    threads: How many threads to use at most; None for one on each processor.
    streaming: Whether stores bypass the caches.)";

constexpr char kMemoryBandwidthDoc[] =
    R"(memory_bandwidth(threads=None, *, bytes_per_array=268435456, repeats=10)
--

Measures the host memory's bandwidth with the triad, in bytes per second.

Counts 12 bytes for each value: two reads and a write. Measured with plain and with streaming stores
in turn, each the median over the repeats, on three arrays that the same threads have touched first.
Arrays that fit into a cache measure the cache.

Args:
    threads: How many threads to use at most; None for one on each processor.
    bytes_per_array: The size of each of the three arrays.
    repeats: How often to measure.

Returns:
    A dict of "plain", "streaming" and the larger of the two as "best".)";

constexpr char kCudaStatusDoc[] = R"(cuda_status()
--

What CUDA there is, as a dict; never raises.

Returns:
    "built": whether this build has CUDA kernels; "runtime_version" (that of the build) and
    "driver_version" (the newest that the driver serves), as 1000 * major + 10 * minor or 0;
    "device_count"; "error": None, or why there is no device to use.)";

constexpr char kBuildInfoDoc[] = R"(build_info()
--

Facts of the build, as a dict: "compiler", "cuda_runtime_version" (None without CUDA kernels) and
"instruction_sets".)";

}  // namespace

PYBIND11_MODULE(_kernels, module) {
  module.doc() = "The accumulation kernels on NumPy arrays and on arrays in CUDA memory.";
  InstructionSets();
  py::options options;
  options.disable_function_signatures();
  using py::literals::operator""_a;
  const py::none none;

  module.def("accumulate", Accumulate, kAccumulateDoc, "accumulators"_a, "gradients"_a,
             py::kw_only(), "scale"_a = 1.0, "overwrite"_a = false, "all_finite"_a = none,
             "threads"_a = none, "stream"_a = 0);
  module.def("accumulate_rows", AccumulateRows, kAccumulateRowsDoc, "accumulator"_a, "values"_a,
             "indices"_a, py::kw_only(), "touched_rows"_a = none, "scale"_a = 1.0,
             "overwrite"_a = false, "all_finite"_a = none, "threads"_a = none, "stream"_a = 0);
  module.def("instruction_sets", InstructionSets, kInstructionSetsDoc);
  module.def("instruction_set", InstructionSet, kInstructionSetDoc);
  module.def("use_instruction_set", ChooseInstructionSet, kUseInstructionSetDoc, "name"_a);
  module.def("triad", CallTriad, kTriadDoc, "a"_a, "b"_a, "c"_a, py::kw_only(), "scale"_a = 1.0,
             "threads"_a = none, "streaming"_a = false);
  module.def("memory_bandwidth", CallMemoryBandwidth, kMemoryBandwidthDoc, "threads"_a = none,
             py::kw_only(), "bytes_per_array"_a = 256 << 20, "repeats"_a = 10);
  module.def("cuda_status", CudaStatus, kCudaStatusDoc);
  module.def("build_info", BuildInfo, kBuildInfoDoc);
}

}  // namespace accumops
