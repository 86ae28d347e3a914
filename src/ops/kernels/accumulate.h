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

// `all_finite`, where it is not null, becomes false if a gradient holds Inf or NaN, also with a
// scale of 0; it is never set to true.
void AccumulateCpu(const AccumulateItem* items, std::size_t count, double scale, bool overwrite,
                   bool* all_finite, Executor& executor);

// All pointers within the items, `overwrite` and `all_finite` are device memory; the item list
// itself is read before the call returns. Returns null, or the text of the CUDA error.
const char* AccumulateCuda(const AccumulateItem* items, std::size_t count, DeviceScalar scale,
                           const bool* overwrite, bool* all_finite, CUstream_st* stream);

}  // namespace accumops
