// accumops.ops._kernels: the kernels' launchers on arrays. Without TensorFlow, so that they can be
// tested and timed alone.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "array.h"
#include "bindings.h"
#include "call.h"
#include "memory_bandwidth.h"
#include "span.h"
#include "thread_pool.h"

namespace accumops {
namespace {

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
  const double factor = ToNumber(scale, "scale");
  PoolExecutor executor(ThreadCount(threads));
  WithoutGil([&] {
    Triad(values(0), values(1), values(2), static_cast<float>(factor), arrays[0].size, streaming,
          executor);
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

// The instruction sets that this processor and build can use. Each is tried once, at import.
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
  module.doc() = "The kernels on NumPy arrays and on arrays in CUDA memory.";
  InstructionSets();
  py::options options;
  options.disable_function_signatures();
  using py::literals::operator""_a;
  const py::none none;

  BindAccumulate(module);
  BindUpdate(module);
  BindSquaredNorms(module);
  BindClipUnits(module);
  BindBatchNorm(module);
  BindMoments(module);
  BindNoise(module);
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
