// squared_norms() and the size of its workspace.
#include <vector>

#include "bindings.h"
#include "call.h"
#include "squared_norm.h"

namespace accumops {
namespace {

std::vector<SquaredNormItem> ToItems(const std::vector<Array>& arrays) {
  std::vector<SquaredNormItem> items;
  for (const Array& array : arrays) items.push_back({array.data, array.size, ToDType(array)});
  return items;
}

void SquaredNorms(py::handle arrays, py::handle sums, py::handle workspace, py::handle threads,
                  std::uintptr_t stream) {
  const std::vector<Array> sources = ToArrays(arrays, "arrays");
  const Array target = ToArray(sums, {"sums"});
  const Workspace memory(workspace);
  Call call(threads, stream);
  const std::vector<SquaredNormItem> items = ToItems(sources);
  RequireElement(target, {Element::kFloat64}, "float64");
  RequireShape(target, {static_cast<std::int64_t>(items.size())}, ", one for each of arrays");
  call.Write(target);
  memory.AddTo(call);
  for (const Array& array : sources) call.Read(array);
  auto* const results = reinterpret_cast<double*>(target.data);
  call.Run(
      [&](Executor& executor) { SquaredNormsCpu(items.data(), items.size(), results, executor); },
      [&](auto& on) {
        const auto bytes =
            static_cast<std::int64_t>(SquaredNormsWorkspace(items.data(), items.size()));
        return SquaredNormsCuda(items.data(), items.size(), results, memory.Place(on, bytes),
                                on.stream());
      });
}

std::int64_t NormsWorkspaceBytes(py::handle arrays) {
  const std::vector<SquaredNormItem> items = ToItems(ToArrays(arrays, "arrays"));
#if defined(ACCUMOPS_CUDA)
  return static_cast<std::int64_t>(SquaredNormsWorkspace(items.data(), items.size()));
#else
  return 0;
#endif
}

constexpr char kSquaredNormsDoc[] =
    R"(squared_norms(arrays, sums, *, workspace=None, threads=None, stream=0)
--

Writes the sum of each array's squares, in float64; all of them in one pass.

The same input gives the same bits on every run and with any number of threads, but not on a GPU and
a CPU: they add in another order. A sum is finite where all values are.

Args:
    arrays: Sequence of C-contiguous arrays of float16, bfloat16 (or its bits as uint16), float32 or
        float64.
    sums: Writable array of float64, of shape [len(arrays)].
    workspace: None, or CUDA memory to work in, of squared_norms_workspace() bytes and aligned to
        256: any writable array. It is allocated in stream order where there is none.
    threads, stream: As in accumulate().

Raises:
    TypeError, ValueError, RuntimeError: As accumulate().)";

constexpr char kNormsWorkspaceDoc[] = R"(squared_norms_workspace(arrays)
--

The bytes of CUDA memory that squared_norms() of these arrays works in; 0 in a build without CUDA.)";

}  // namespace

void BindSquaredNorms(py::module_& module) {
  using py::literals::operator""_a;
  const py::none none;
  module.def("squared_norms", SquaredNorms, kSquaredNormsDoc, "arrays"_a, "sums"_a, py::kw_only(),
             "workspace"_a = none, "threads"_a = none, "stream"_a = 0);
  module.def("squared_norms_workspace", NormsWorkspaceBytes, kNormsWorkspaceDoc, "arrays"_a);
}

}  // namespace accumops
