// The moments of a window's micro-batches together, and the running statistics that move by them.
//
//   window <- merge(window, batch), by Chan's formula, in double; starts anew without values in it
//   calls  <- calls + 1
//   and where that ends the window, which then is empty again: if it had values,
//   moving <- moving * momentum + (mean and biased variance of the window) * (1 - momentum)
//
// A call without a batch ends the window; without moving statistics, too, the window's moments are
// dropped. A call with moving statistics ends the window where `limit` calls have been made, and
// where there is no window: then the batch is all of it. Any other call leaves the window open.
// With `only_finite`, a batch with a mean or variance that is not finite counts as one without
// values: what is merged cannot be taken out of a window.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

struct CUstream_st;

namespace accumops {

// A batch's moments, as batch_norm.h computes them.
struct BatchMoments {
  const std::int64_t* count;  // one number; null where there is no batch
  const void* mean;           // of each channel, rounded
  const void* rest;           // of each channel: the mean is mean + rest
  const void* variance;       // of each channel, biased
  DType dtype;                // kFloat32, or kFloat64 for float64 data
};

struct MomentsWindow {
  enum Counter { kValues, kCalls, kLimit, kCounters };
  std::int64_t* counters;  // null where there is no window
  double* mean;            // of each channel
  double* centred;         // of each channel, the sum of squared distances from its mean
};

struct MovingStatistics {
  void* mean;      // of each channel; null where there are no moving statistics
  void* variance;  // of each channel
  DType dtype;     // kFloat32 or kFloat64
  double momentum;
};

struct MomentsMerge {
  std::int64_t channels;
  BatchMoments batch;
  MomentsWindow window;
  MovingStatistics moving;
  bool only_finite;
};

// Merges that have no window and no statistics in common.
struct MomentsMerges {
  const MomentsMerge* merges;
  std::size_t count;
  const bool* applies;  // null means true; where it is false, nothing is written
};

void MergeMomentsCpu(const MomentsMerges& args);
// All pointers but `args.merges` are device memory. Returns null, or the text of the CUDA error.
const char* MergeMomentsCuda(const MomentsMerges& args, CUstream_st* stream);

}  // namespace accumops
