// acc[indices[i]] <- acc[indices[i]] + scale * values[i] for i = 0, 1, …, in that order for each
// row, so duplicates add up in a fixed order. With `overwrite` the accumulator is cleared first.
// Products and sums are rounded as in accumulate.h. As there, a scale of 0 adds nothing, whatever
// the values hold; then no row is touched.
//
// `touched_rows`, one flag a row, makes that clearing cheap: the kernel sets the flag of each row
// it adds to, and relies on every row without a flag being zero, so only flagged rows are cleared.
// Without it all rows are.
#pragma once

#include <cstddef>
#include <cstdint>

#include "accumulate.h"

namespace accumops {

struct AccumulateRowsItem {
  void* accumulator;    // [rows, columns]
  const void* values;   // [count, columns]
  const void* indices;  // [count], int32 or int64
  bool* touched_rows;   // [rows], or null
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t count;
  DType accumulator_dtype;
  DType values_dtype;
  bool indices_are_int64;
};

// The first index outside [0, rows), as a position in `indices`, or -1.
std::int64_t FindBadIndex(const void* indices, bool indices_are_int64, std::int64_t count,
                          std::int64_t rows);

// Every index must lie in [0, rows). `all_finite` as in AccumulateCpu.
void AccumulateRowsCpu(const AccumulateRowsItem& item, double scale, bool overwrite,
                       bool* all_finite, Executor& executor);

// Indices live on the device and cannot be checked without a copy to the host: a row whose index
// lies outside [0, rows) is skipped, as TensorFlow's own GPU scatters do. Returns null, or the text
// of the CUDA error.
const char* AccumulateRowsCuda(const AccumulateRowsItem& item, DeviceScalar scale,
                               const bool* overwrite, bool* all_finite, CUstream_st* stream);

}  // namespace accumops
