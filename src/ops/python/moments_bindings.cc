// merge_moments().
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
  MomentsMerge AddTo(Call& call, double momentum) const {
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
    }
    return args;
  }

 private:
  const std::vector<Array> batch_, window_, moving_;
};

void MergeMoments(py::handle batch, py::handle window, py::handle moving, py::handle momentum,
                  std::uintptr_t stream) {
  const Merge merge(batch, window, moving);
  Call call(py::int_(1), stream);
  const MomentsMerge args = merge.AddTo(call, ToNumber(momentum, "momentum"));
  call.Run([&](Executor&) { MergeMomentsCpu(args); },
           [&](auto& on) { return MergeMomentsCuda(args, on.stream()); });
}

constexpr char kMergeMomentsDoc[] =
    R"(merge_moments(batch, *, window=None, moving=None, momentum=0.99, stream=0)
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
    stream: As in accumulate().

Raises:
    TypeError, ValueError, RuntimeError: As accumulate().)";

}  // namespace

void BindMoments(py::module_& module) {
  using py::literals::operator""_a;
  const py::none none;
  module.def("merge_moments", MergeMoments, kMergeMomentsDoc, "batch"_a, py::kw_only(),
             "window"_a = none, "moving"_a = none, "momentum"_a = 0.99, "stream"_a = 0);
}

}  // namespace accumops
