// The arithmetic of moments.h, one for both devices: constexpr, so that device code may call it.
#pragma once

#include <type_traits>

#include "moments.h"

namespace accumops {

// Whether a batch's moments of one channel are finite.
template <typename Batch>
constexpr bool IsFinite(const MomentsMerge& args, std::int64_t c) {
  const Batch mean = static_cast<const Batch*>(args.batch.mean)[c];
  const Batch variance = static_cast<const Batch*>(args.batch.variance)[c];
  return mean - mean == 0 && variance - variance == 0;
}

// What a merge does, from the counters as they are before it.
struct MergePlan {
  double before;  // values in the window
  double added;   // values in the batch
  double total;   // values in both
  bool ends;

  // `counts` says whether the batch's values count.
  constexpr MergePlan(const MomentsMerge& args, bool counts)
      : before(args.window.counters == nullptr
                   ? 0
                   : static_cast<double>(args.window.counters[MomentsWindow::kValues])),
        added(args.batch.count == nullptr || !counts ? 0 : static_cast<double>(*args.batch.count)),
        total(before + added),
        ends(args.batch.count == nullptr ||
             (args.moving.mean != nullptr && (args.window.counters == nullptr ||
                                              args.window.counters[MomentsWindow::kCalls] + 1 >=
                                                  args.window.counters[MomentsWindow::kLimit]))) {}

  constexpr void Count(const MomentsMerge& args) const {
    std::int64_t* counters = args.window.counters;
    if (counters == nullptr) return;
    counters[MomentsWindow::kValues] = ends ? 0 : static_cast<std::int64_t>(total);
    counters[MomentsWindow::kCalls] = ends ? 0 : counters[MomentsWindow::kCalls] + 1;
  }
};

template <typename T>
constexpr T Moved(T moving, double value, double momentum) {
  return moving * static_cast<T>(momentum) + static_cast<T>(value) * static_cast<T>(1 - momentum);
}

// `Batch` is the type of the batch's moments, `Moving` the type of the running statistics.
template <typename Batch, typename Moving>
constexpr void MergeChannel(const MomentsMerge& args, const MergePlan& plan, std::int64_t c) {
  double mean = plan.before == 0 ? 0 : args.window.mean[c];
  double centred = plan.before == 0 ? 0 : args.window.centred[c];
  if (plan.added != 0) {
    const double share = plan.added / plan.total;
    const double delta = static_cast<double>(static_cast<const Batch*>(args.batch.mean)[c]) +
                         static_cast<const Batch*>(args.batch.rest)[c] - mean;
    centred += static_cast<const Batch*>(args.batch.variance)[c] * plan.added +
               delta * delta * (plan.before * share);
    mean += delta * share;
  }
  if (args.window.counters != nullptr && !plan.ends) {
    args.window.mean[c] = mean;
    args.window.centred[c] = centred;
  }
  if (plan.ends && plan.total != 0 && args.moving.mean != nullptr) {
    Moving& moving_mean = static_cast<Moving*>(args.moving.mean)[c];
    Moving& moving_variance = static_cast<Moving*>(args.moving.variance)[c];
    moving_mean = Moved(moving_mean, mean, args.moving.momentum);
    moving_variance = Moved(moving_variance, centred / plan.total, args.moving.momentum);
  }
}

// Calls `run` with null pointers to the types of a merge's batch and running statistics.
template <typename Run>
constexpr void WithTypesOf(const MomentsMerge& args, Run run) {
  const bool wide_batch = args.batch.dtype == DType::kFloat64;
  const bool wide_moving = args.moving.dtype == DType::kFloat64;
  float* narrow = nullptr;
  double* wide = nullptr;
  if (wide_batch) {
    wide_moving ? run(wide, wide) : run(wide, narrow);
  } else {
    wide_moving ? run(narrow, wide) : run(narrow, narrow);
  }
}

}  // namespace accumops
