// clip_units() and the size of its workspace.
#include <vector>

#include "bindings.h"
#include "call.h"
#include "clip_units.h"

namespace accumops {
namespace {

// The arrays of a call, by gradient.
class Clipped {
 public:
  Clipped(py::handle gradients, py::handle weights, py::handle outputs)
      : gradients_(ToArrays(gradients, "gradients")),
        weights_(ToArrays(weights, "weights")),
        outputs_(ToArrays(outputs, "outputs")) {
    RequireLength("weights", weights_.size(), gradients_.size(), ", one for each of gradients");
    RequireLength("outputs", outputs_.size(), gradients_.size(), ", one for each of gradients");
  }

  // Checks all arrays and adds them to the call.
  std::vector<ClipItem> AddTo(Call& call) const {
    for (std::size_t i = 0; i < gradients_.size(); ++i) {
      for (const Array* array : {&gradients_[i], &weights_[i], &outputs_[i]}) {
        RequireElement(*array, {Element::kFloat32}, "float32");
        RequireShape(*array, gradients_[i].shape, ", the shape of " + gradients_[i].name.str());
      }
      call.Read(gradients_[i]);
      call.Read(weights_[i]);
      call.Write(outputs_[i]);
    }
    return Items();
  }

  std::vector<ClipItem> Items() const {
    std::vector<ClipItem> items;
    for (std::size_t i = 0; i < gradients_.size(); ++i) {
      const Array& gradient = gradients_[i];
      const std::int64_t units = gradient.shape.size() < 2 ? 1 : gradient.shape.back();
      items.push_back({reinterpret_cast<const float*>(gradient.data),
                       reinterpret_cast<const float*>(weights_[i].data),
                       reinterpret_cast<float*>(outputs_[i].data),
                       units == 0 ? 0 : gradient.size / units, units});
    }
    return items;
  }

 private:
  const std::vector<Array> gradients_, weights_, outputs_;
};

void ClipUnits(py::handle gradients, py::handle weights, py::handle outputs, py::handle clip_factor,
               py::handle epsilon, py::handle workspace, py::handle threads,
               std::uintptr_t stream) {
  const Clipped arrays(gradients, weights, outputs);
  const ClipSettings settings = {ToMagnitude(clip_factor, "clip_factor"),
                                 ToMagnitude(epsilon, "epsilon")};
  const Workspace memory(workspace);
  Call call(threads, stream);
  const std::vector<ClipItem> items = arrays.AddTo(call);
  memory.AddTo(call);
  call.Run(
      [&](Executor& executor) { ClipUnitsCpu(items.data(), items.size(), settings, executor); },
      [&](auto& on) {
        const auto bytes =
            static_cast<std::int64_t>(ClipUnitsWorkspace(items.data(), items.size()));
        return ClipUnitsCuda(items.data(), items.size(), settings, memory.Place(on, bytes),
                             on.stream());
      });
}

std::int64_t ClipWorkspaceBytes(py::handle gradients) {
  const std::vector<ClipItem> items = Clipped(gradients, gradients, gradients).Items();
#if defined(ACCUMOPS_CUDA)
  return static_cast<std::int64_t>(ClipUnitsWorkspace(items.data(), items.size()));
#else
  return 0;
#endif
}

constexpr char kClipUnitsDoc[] =
    R"(clip_units(gradients, weights, outputs, *, clip_factor, epsilon, workspace=None, threads=None, stream=0)
--

Writes gradients clipped by the norms of their weights, unit by unit.

A unit is all values at one index of the last axis; an array of one axis or none is one unit. Where
the norm of a unit's gradient is more than limit = clip_factor * max(norm of its weights, epsilon),
it is multiplied by limit / norm. A unit with a value that is not finite stays as it is. The same
input gives the same bits on every run and with any number of threads, but not on a GPU and a CPU.

Args:
    gradients: Sequence of C-contiguous arrays of float32.
    weights: Sequence of such arrays, of the gradients' shapes.
    outputs: Sequence of writable arrays of the gradients' shapes.
    clip_factor, epsilon: Numbers, finite and at least 0.
    workspace: None, or CUDA memory to work in, of clip_units_workspace() bytes and aligned to 256:
        any writable array. It is allocated in stream order where there is none.
    threads, stream: As in accumulate().

Raises:
    TypeError, ValueError, RuntimeError: As accumulate().)";

constexpr char kClipWorkspaceDoc[] = R"(clip_units_workspace(gradients)
--

The bytes of CUDA memory that clip_units() of these arrays works in; 0 in a build without CUDA.)";

}  // namespace

void BindClipUnits(py::module_& module) {
  using py::literals::operator""_a;
  const py::none none;
  module.def("clip_units", ClipUnits, kClipUnitsDoc, "gradients"_a, "weights"_a, "outputs"_a,
             py::kw_only(), "clip_factor"_a, "epsilon"_a, "workspace"_a = none, "threads"_a = none,
             "stream"_a = 0);
  module.def("clip_units_workspace", ClipWorkspaceBytes, kClipWorkspaceDoc, "gradients"_a);
}

}  // namespace accumops
