// How noisy a window's gradient is, from the squared norms of the gradients of its micro-batches:
// the sums over an open window, and the averages that a window moves where it ends. Which formulas
// these are says accumops/window/noise.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

struct CUstream_st;

namespace accumops {

// What is known of an open window: this many float64 values, in this order.
struct NoiseWindow {
  static constexpr int kSquares = 0;  // the shares times the squared norms of the gradients
  static constexpr int kCount = 1;    // micro-batches that have a share
  static constexpr int kSums = 2;     // the squared norm of the sums of weighted gradients
  static constexpr int kShares = 3;   // the sum of all shares, those of earlier windows included
  static constexpr int kSize = 4;
};

// What is known from the windows that have ended.
struct NoiseStatistics {
  static constexpr int kAverages = 3;  // the averages of the trace, of the square, and of 1
  static constexpr int kEnded = 2;     // the numbers of windows and of their micro-batches

  double* averages;
  double* norm;  // the norm of the last window's gradient, or NaN if that window made no update
  std::int64_t* ended;
};

// A micro-batch: its share, and the sums over all variables of the squared norms of its gradients,
// and of the window's sums with it.
struct NoiseGroup {
  double gradients, sums;
  double share;
  bool starts;  // whether it is the first of its window
};

// How a window ends.
struct NoiseEnding {
  double shares;  // the sum over its micro-batches
  double scale;   // a factor that its gradients have
  bool applies;   // whether it makes an update
  std::int64_t steps;
  double decay;
};

namespace noise {

constexpr double kNan = __builtin_nan("");

constexpr bool IsFinite(double x) { return x - x == 0; }

constexpr double DivideNoNan(double a, double b) { return b == 0 ? 0 : a / b; }

// constexpr, so that device code may call them.
constexpr void AddGroup(const NoiseGroup& group, double* window) {
  // A share of 0 counts as nothing, whatever the gradient is.
  const double squares = group.share == 0 ? 0 : group.gradients * group.share;
  const double count = group.share == 0 ? 0 : 1;
  window[NoiseWindow::kSquares] = group.starts ? squares : window[NoiseWindow::kSquares] + squares;
  window[NoiseWindow::kCount] = group.starts ? count : window[NoiseWindow::kCount] + count;
  window[NoiseWindow::kSums] = group.sums;
  window[NoiseWindow::kShares] += group.share;
}

// Moves the averages and counts the window. Returns the squared norm of its gradient, or NaN if it
// makes no update.
constexpr double EndWindow(const double* window, const NoiseEnding& ending,
                           const NoiseStatistics& statistics) {
  const double unscaled = 1 / (ending.scale * ending.scale);
  const double shares = ending.shares, count = window[NoiseWindow::kCount];
  const double mean = unscaled * DivideNoNan(window[NoiseWindow::kSums], shares * shares);
  const double trace =
      DivideNoNan(unscaled * window[NoiseWindow::kSquares] - shares * mean, count - 1);
  const double found[NoiseStatistics::kAverages] = {trace, mean - DivideNoNan(trace, shares), 1};
  const bool makes_update = ending.applies && IsFinite(mean);
  if (makes_update && IsFinite(trace) && count > 1) {
    for (int i = 0; i < NoiseStatistics::kAverages; ++i) {
      statistics.averages[i] =
          ending.decay * statistics.averages[i] + (1 - ending.decay) * found[i];
    }
  }
  statistics.ended[0] += 1;
  // As unsigned numbers: any sum is defined.
  statistics.ended[1] = static_cast<std::int64_t>(static_cast<std::uint64_t>(statistics.ended[1]) +
                                                  static_cast<std::uint64_t>(ending.steps));
  return makes_update ? mean : kNan;
}

}  // namespace noise

// `norms` are the squared norms of `count` gradients, and then those of their sums. The flag and
// the scalar are beside them: host memory, or device memory for CUDA.
void AddNoiseGroupCpu(const double* norms, std::size_t count, double share, bool starts,
                      double* window);
void EndNoiseWindowCpu(const double* window, const NoiseEnding& ending,
                       const NoiseStatistics& statistics);

// They return null, or the text of the CUDA error. Of `ending` they read steps and decay; the rest
// is device memory.
const char* AddNoiseGroupCuda(const double* norms, std::size_t count, DeviceScalar share,
                              const bool* starts, double* window, CUstream_st* stream);
const char* EndNoiseWindowCuda(const double* window, const NoiseEnding& ending, DeviceScalar shares,
                               const double* scale, const bool* applies,
                               const NoiseStatistics& statistics, CUstream_st* stream);

}  // namespace accumops
