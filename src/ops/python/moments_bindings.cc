// merge_moments(), add_to_windows() and end_windows().
#include <string>
#include <vector>

#include "bindings.h"
#include "call.h"
#include "moments.h"

namespace accumops {
namespace {

// The arrays of an argument that is a sequence of `length` arrays, or None: then there are none.
std::vector<Array> ToGroup(py::handle object, const char* argument, std::size_t length,
                           const char* contents) {
  if (object.is_none()) return {};
  std::vector<Array> arrays = ToArrays(object, argument);
  RequireLength(argument, arrays.size(), length, contents);
  return arrays;
}

// The type of an array, which must be the type of `first`, float32 or float64.
DType ChannelsType(const Array& array, const Array& first) {
  RequireElement(array, {first.element}, ("that of " + first.name.str()).c_str());
  return AccumulatorDType(array);
}

class Merge {
 public:
  Merge(py::handle batch, py::handle window, py::handle moving)
      : batch_(ToGroup(batch, "batch", 4, ": count, mean, rest and variance")),
        window_(ToGroup(window, "window", 2, ": counters and moments")),
        moving_(ToGroup(moving, "moving", 2, ": mean and variance")) {
    if (batch_.empty() + window_.empty() + moving_.empty() > 1) {
      throw py::value_error("two of batch, window and moving, or all, must not be None");
    }
  }

  // Checks all arrays and adds them to the call.
  MomentsMerge AddTo(Call& call, double momentum, bool only_finite) const {
    MomentsMerge args = {};
    const Array& first = batch_.empty() ? moving_[0] : batch_[1];
    if (first.shape.size() != 1) {
      throw py::value_error(first.name.str() + " has shape " + ShapeText(first.shape) +
                            "; it must have one axis, a value for each channel");
    }
    args.channels = first.size;
    const std::string because = ", that of " + first.name.str();
    if (!moving_.empty()) {
      for (const Array& array : moving_) {
        args.moving.dtype = ChannelsType(array, moving_[0]);
        RequireShape(array, {args.channels}, because);
        call.Write(array);
      }
      args.moving = {moving_[0].data, moving_[1].data, args.moving.dtype, momentum};
    }
    if (!window_.empty()) {
      RequireElement(window_[0], {Element::kInt64}, "int64");
      RequireShape(window_[0], {MomentsWindow::kCounters}, ": values, calls and their limit");
      RequireElement(window_[1], {Element::kFloat64}, "float64");
      RequireShape(window_[1], {2, args.channels},
                   ": means and sums of squares, of as many channels as " + first.name.str());
      for (const Array& array : window_) call.Write(array);
      auto* const values = reinterpret_cast<double*>(window_[1].data);
      args.window = {reinterpret_cast<std::int64_t*>(window_[0].data), values,
                     values + args.channels};
    }
    if (!batch_.empty()) {
      RequireElement(batch_[0], {Element::kInt64}, "int64");
      RequireOneElement(batch_[0]);
      for (std::size_t i = 1; i < batch_.size(); ++i) {
        args.batch.dtype = ChannelsType(batch_[i], batch_[1]);
        RequireShape(batch_[i], {args.channels}, because);
      }
      for (const Array& array : batch_) call.Read(array);
      args.batch = {reinterpret_cast<const std::int64_t*>(batch_[0].data), batch_[1].data,
                    batch_[2].data, batch_[3].data, args.batch.dtype};
      args.only_finite = only_finite;
    }
    return args;
  }

 private:
  const std::vector<Array> batch_, window_, moving_;
};

void MergeMoments(py::handle batch, py::handle window, py::handle moving, py::handle momentum,
                  bool only_finite, std::uintptr_t stream) {
  const Merge merge(batch, window, moving);
  Call call(py::int_(1), stream);
  const MomentsMerge args = merge.AddTo(call, ToNumber(momentum, "momentum"), only_finite);
  call.Run([&](Executor&) { MergeMomentsCpu({&args, 1, nullptr}); },
           [&](auto& on) { return MergeMomentsCuda({&args, 1, nullptr}, on.stream()); });
}

// Runs merges together, if a flag of the call says so.
void RunTogether(const Call& call, const std::vector<MomentsMerge>& merges, const Flag& applies) {
  if (merges.empty()) return;
  call.Run([&](Executor&) { MergeMomentsCpu({merges.data(), merges.size(), &applies.value}); },
           [&](auto& on) -> const char* {
             if (!applies.array && !applies.value) return nullptr;
             return MergeMomentsCuda({merges.data(), merges.size(), Flags(Pointer(applies.array))},
                                     on.stream());
           });
}

void AddToWindows(py::handle batches, py::handle windows, py::handle applies,
                  std::uintptr_t stream) {
  const auto added = ToObjects(batches, "batches", "a sequence with four arrays for each window");
  const auto open = ToObjects(windows, "windows", "a sequence with two arrays for each window");
  RequireLength("batches", added.size(), open.size(), ", one for each of windows");
  const Flag flag(applies, "applies");
  Call call(py::int_(1), stream);
  std::vector<Merge> arrays;
  std::vector<MomentsMerge> merges;
  for (std::size_t i = 0; i < open.size(); ++i) {
    arrays.emplace_back(added[i], open[i], py::none());
  }
  for (const Merge& each : arrays) merges.push_back(each.AddTo(call, 0, false));
  call.ReadScalar(flag.array);
  RunTogether(call, merges, flag);
}

// The arrays of windows that end.
class Ending {
 public:
  Ending(py::handle counters, py::handle moments, py::handle means, py::handle variances,
         py::handle momenta, py::handle applies)
      : counters_(ToArrays(counters, "counters")),
        moments_(ToArrays(moments, "moments")),
        applies_(applies, "applies") {
    RequireLength("moments", moments_.size(), counters_.size(), ", one for each of counters");
    if (means.is_none() != variances.is_none()) {
      throw py::value_error("moving_means and moving_variances must both be None, or neither");
    }
    if (means.is_none()) return;
    means_ = ToArrays(means, "moving_means");
    variances_ = ToArrays(variances, "moving_variances");
    RequireLength("moving_means", means_.size(), counters_.size(), ", one for each of counters");
    RequireLength("moving_variances", variances_.size(), counters_.size(),
                  ", one for each of counters");
    for (const py::object& momentum : ToObjects(momenta, "momenta", "a sequence of numbers")) {
      momenta_.push_back(ToNumber(momentum, "momenta", "numbers"));
    }
    RequireLength("momenta", momenta_.size(), counters_.size(), ", one for each of counters");
  }

  // Checks all arrays and adds them to the call.
  std::vector<MomentsMerge> AddTo(Call& call) const {
    std::vector<MomentsMerge> windows;
    for (std::size_t i = 0; i < counters_.size(); ++i) {
      const Array &counters = counters_[i], &moments = moments_[i];
      RequireElement(counters, {Element::kInt64}, "int64");
      RequireShape(counters, {MomentsWindow::kCounters}, ": values, calls and their limit");
      RequireElement(moments, {Element::kFloat64}, "float64");
      if (moments.shape.size() != 2 || moments.shape[0] != 2) {
        throw py::value_error(moments.name.str() + " has shape " + ShapeText(moments.shape) +
                              "; it must be (2, channels): means and sums of squares");
      }
      call.Write(counters);
      call.Write(moments);
      auto* const values = reinterpret_cast<double*>(moments.data);
      MomentsMerge window = {};
      window.channels = moments.shape[1];
      window.window = {reinterpret_cast<std::int64_t*>(counters.data), values,
                       values + moments.shape[1]};
      if (!means_.empty()) {
        for (const Array* array : {&means_[i], &variances_[i]}) {
          window.moving.dtype = ChannelsType(*array, means_[i]);
          RequireShape(*array, {window.channels}, ", the channels of " + moments.name.str());
          call.Write(*array);
        }
        window.moving = {means_[i].data, variances_[i].data, window.moving.dtype, momenta_[i]};
      }
      windows.push_back(window);
    }
    call.ReadScalar(applies_.array);
    return windows;
  }

  const Flag& applies() const { return applies_; }

 private:
  const std::vector<Array> counters_, moments_;
  const Flag applies_;
  std::vector<Array> means_, variances_;
  std::vector<double> momenta_;
};

void EndWindows(py::handle counters, py::handle moments, py::handle moving_means,
                py::handle moving_variances, py::handle momenta, py::handle applies,
                std::uintptr_t stream) {
  const Ending ending(counters, moments, moving_means, moving_variances, momenta, applies);
  Call call(py::int_(1), stream);
  RunTogether(call, ending.AddTo(call), ending.applies());
}

constexpr char kMergeMomentsDoc[] =
    R"(merge_moments(batch, *, window=None, moving=None, momentum=0.99, only_finite=False, stream=0)
--

Merges a batch's moments with those of a window, in place; at its end moving statistics move.

A window without values is a new one. It ends with a call that has `moving` when its calls are as
many as its limit, or without a batch: then moving = moving * momentum + moments * (1 - momentum),
if it had values, and it has none again. Without a window the batch is all of it. Two of `batch`,
`window` and `moving` are needed.

Args:
    batch: None, or four arrays: count, of one int64, and mean, rest and variance, as batch_norm()
        writes them: of shape [channels], float32 or float64.
    window: None, or two writable arrays: int64 of shape [3], for values, calls and the limit of
        calls; and float64 of shape [2, channels], for means and sums of squared distances from
        them.
    moving: None, or two writable arrays of shape [channels], both float32 or float64: mean and
        variance.
    momentum: A number.
    only_finite: Whether a batch with a mean or variance that is not finite counts as one without
        values: a bool.
    stream: As in accumulate().

Raises:
    TypeError, ValueError, RuntimeError: As accumulate().)";

constexpr char kAddToWindowsDoc[] =
    R"(add_to_windows(batches, windows, *, applies=True, stream=0)
--

Merges batches' moments with those of windows, in place: merge_moments() for each, without `moving`.

Args:
    batches: For each window the four arrays of merge_moments().
    windows: The two arrays of each window, each given once.
    applies: Whether anything is added. A bool, or for CUDA arrays a one-element device array of
        bool.
    stream: As in accumulate().

Raises:
    TypeError, ValueError, RuntimeError: As accumulate().)";

constexpr char kEndWindowsDoc[] =
    R"(end_windows(counters, moments, *, moving_means=None, moving_variances=None, momenta=(), applies=True, stream=0)
--

Ends windows of merge_moments(), in place: each has no values and no calls then.

Moving statistics move as in merge_moments(). Without them the windows' moments are dropped.

Args:
    counters: A sequence of each window's counters.
    moments: A sequence of each window's moments.
    moving_means: None, or a sequence of each window's moving mean.
    moving_variances: None, or a sequence of each window's moving variance.
    momenta: A sequence of numbers, one for each window. Without moving statistics it is ignored.
    applies: Whether the windows end; if not, nothing is written. A bool, or for CUDA arrays a
        one-element device array of bool.
    stream: As in accumulate().

Raises:
    TypeError, ValueError, RuntimeError: As accumulate().)";

}  // namespace

void BindMoments(py::module_& module) {
  using py::literals::operator""_a;
  const py::none none;
  module.def("merge_moments", MergeMoments, kMergeMomentsDoc, "batch"_a, py::kw_only(),
             "window"_a = none, "moving"_a = none, "momentum"_a = 0.99,
             py::arg("only_finite").noconvert() = false, "stream"_a = 0);
  module.def("add_to_windows", AddToWindows, kAddToWindowsDoc, "batches"_a, "windows"_a,
             py::kw_only(), "applies"_a = true, "stream"_a = 0);
  module.def("end_windows", EndWindows, kEndWindowsDoc, "counters"_a, "moments"_a, py::kw_only(),
             "moving_means"_a = none, "moving_variances"_a = none, "momenta"_a = py::tuple(),
             "applies"_a = true, "stream"_a = 0);
}

}  // namespace accumops
