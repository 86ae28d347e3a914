// The moments of a window's micro-batches together, and the running statistics that move by them.
//
//   window <- merge(window, batch), by Chan's formula, in double; one without values is a new one
//   calls  <- calls + 1
//   and where that ends the window, which then is empty again, if it had values at all
//   moving <- moving * momentum + (mean and biased variance of the window) * (1 - momentum)
//
// A call with moving statistics ends the window where `limit` calls have been made, where it brings
// no batch, and where there is no window: then the batch is all of it. A call without leaves it
// open.
#pragma once

#include <cstdint>

#include "dtype.h"

struct CUstream_st;

namespace accumops {

// Of each channel, as batch_norm.h computes them: float32, or float64 for float64 data.
struct BatchMoments {
  const std::int64_t* count;  // one value; null where there is no batch
  const void* mean;
  const void* rest;
  const void* variance;
  DType dtype;
};

struct MomentsWindow {
  enum Counter { kValues, kCalls, kLimit, kCounters };
  std::int64_t* counters;  // null where there is no window
  double* mean;            // of each channel, as the next
  double* centred;         // the sum of squared distances from the mean
};

struct MovingStatistics {
  void* mean;  // of each channel, as the next; null where there are none
  void* variance;
  DType dtype;  // float32 or float64
  double momentum;
};

struct MomentsMerge {
  std::int64_t channels;
  BatchMoments batch;
  MomentsWindow window;
  MovingStatistics moving;
};

void MergeMomentsCpu(const MomentsMerge& args);
// All pointers are device memory. Returns null, or the text of the CUDA error.
const char* MergeMomentsCuda(const MomentsMerge& args, CUstream_st* stream);

}  // namespace accumops
