// acc <- (overwrite ? 0 : acc) + scale * gradient, element by element, over a list of tensors, in
// place.
//
// The gradient and the scale are converted to the accumulator's type; product and sum are rounded
// separately there, never contracted into one FMA, so every instruction set and every device
// returns the same bits. With `overwrite` the accumulator is written and not read: what it held,
// NaN included, has no influence.
//
// A scale that is 0 in the accumulator's type, of either sign, adds nothing, whatever the gradient
// holds, Inf and NaN included: the accumulator keeps its bits, or is +0 with `overwrite`. Chunks
// decide it, not elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"
#include "parallel_for.h"

struct CUstream_st;

namespace accumops {

struct AccumulateItem {
  void* accumulator;
  const void* gradient;
  std::int64_t size;  // elements
  DType accumulator_dtype;
  DType gradient_dtype;
};

// What a call reports of the gradients, in the same pass.
struct AccumulateReport {
  // Becomes false if a gradient holds Inf or NaN, also with a scale of 0; it is never set to true.
  bool* all_finite = nullptr;
  // The sum of squares of each gradient, as it is given, and then of each accumulator, as the call
  // leaves it: 2 * count sums. They are right to about 1e-6 of themselves, and finite exactly if
  // all values are. The order of the additions depends on sizes and alignments alone.
  double* squared_norms = nullptr;
};

void AccumulateCpu(const AccumulateItem* items, std::size_t count, double scale, bool overwrite,
                   const AccumulateReport& report, Executor& executor);

// Bytes of device memory that AccumulateCuda needs to work in for the squared norms, aligned to 16.
std::size_t AccumulateNormsWorkspace(const AccumulateItem* items, std::size_t count);

// All pointers within the items, `overwrite`, the report's and the workspace are device memory; the
// item list itself is read before the call returns. Returns null, or the text of the CUDA error.
const char* AccumulateCuda(const AccumulateItem* items, std::size_t count, DeviceScalar scale,
                           const bool* overwrite, const AccumulateReport& report, void* workspace,
                           CUstream_st* stream);

}  // namespace accumops
