// The CPU's inner loops of the update and of squared norms, on one thread. update_span.cc is
// compiled once for each instruction set, and all of them give the same bits.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "update.h"

namespace accumops {

// A run of values that lie side by side, with their slots, gradients and factors.
struct UpdateSpan {
  float* value;
  float* slots[kMaxSlots];
  const float* accumulator;  // or null: then zero
  const void* latest;        // or null
  std::int64_t size;
  DType latest_dtype;
  float scale, weight, rate, decay;
  bool decays;
};

struct UpdateSpanFunctions {
  void (*update)(const UpdateSpan& span, const UpdateSettings& settings);
  double (*squared_norm)(const void* values, std::int64_t size, DType dtype);
};

// The functions of the instruction set in use, see span.h.
const UpdateSpanFunctions& CurrentUpdateSpanFunctions();

}  // namespace accumops
