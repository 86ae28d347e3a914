// The CPU's inner loops of adaptive gradient clipping, on one thread. clip_span.cc is compiled once
// for each instruction set, and all of them give the same bits.
#pragma once

#include <cstdint>

namespace accumops {

// Rows of `units` values, each `stride` values after the one before it.
struct ClipRows {
  std::int64_t rows, units, stride;
};

struct ClipSpanFunctions {
  // Writes the sum of each column's squares.
  void (*column_squares)(const float* values, const ClipRows& shape, double* sums);
  // to = from * factor, with a factor for each column.
  void (*scale_columns)(const float* from, float* to, const ClipRows& shape, const double* factors);
};

// The functions of the instruction set in use, see span.h.
const ClipSpanFunctions& CurrentClipSpanFunctions();

}  // namespace accumops
