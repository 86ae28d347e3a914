// The moments of a window's micro-batches together, and the running statistics that move by them.
//
//   window <- merge(window, batch), by Chan's formula, in double; starts anew without values in it
//   calls  <- calls + 1
//   and where that ends the window, which then is empty again: if it had values,
//   moving <- moving * momentum + (mean and biased variance of the window) * (1 - momentum)
//
// A call with moving statistics ends the window where `limit` calls have been made, where it brings
// no batch, and where there is no window: then the batch is all of it. A call without moving
// statistics leaves the window open.
#pragma once

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
};

void MergeMomentsCpu(const MomentsMerge& args);
// All pointers are device memory. Returns null, or the text of the CUDA error.
const char* MergeMomentsCuda(const MomentsMerge& args, CUstream_st* stream);

}  // namespace accumops
