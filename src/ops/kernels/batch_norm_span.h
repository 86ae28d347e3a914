// The CPU's inner loops of batch normalization, on one thread. batch_norm_span.cc is compiled once
// for each instruction set, and all three give the same bits: a column's values are added in the
// same order in each.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace accumops {

// A block of memory: `rows` rows of `columns` values, `stride` values from row to row.
struct BatchNormBlock {
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t stride;
  DType dtype;
};

// The factors that normalize a column's values, or make its gradients. For `uniform` blocks, whose
// rows are of a single channel, each array has one value; else one for each column. Values are
// double for float64 data and float for all other.
struct BatchNormFactors {
  const void* shift;
  const void* scale;
  const void* slope;
  const void* offset;
  bool uniform;
  bool streaming;  // store past the caches: the block is aligned to cache lines
};

struct BatchNormSpanFunctions {
  // Merges the block's moments into the moments of its columns, by Chan's formula. `mean` and
  // `centred` are of `*count` values before, and of the block's as well after. With a mask only
  // rows whose flag is true count.
  void (*moments)(const BatchNormBlock& block, const void* x, const bool* mask, double* count,
                  double* mean, double* centred);
  // The same for a single channel that has all of the block's values.
  void (*uniform_moments)(const BatchNormBlock& block, const void* x, double* count, double* mean,
                          double* centred);
  // Merges moments of `size` values a column into moments of `count`. The caller updates the count.
  void (*merge)(const double* mean, const double* centred, std::int64_t columns, double size,
                double count, double* merged_mean, double* merged_centred);
  // y = (x - shift) * scale + offset
  void (*normalize)(const BatchNormBlock& block, const void* x, void* y,
                    const BatchNormFactors& factors);
  // sum_dy += sum(dy), sum_product += sum(dy * (x - shift)), for each column, or for a `uniform`
  // block as a whole.
  void (*gradient_sums)(const BatchNormBlock& block, const void* x, const void* dy,
                        const BatchNormFactors& factors, double* sum_dy, double* sum_product);
  // dx = scale * dy + mask * (slope * (x - shift) + offset)
  void (*gradient)(const BatchNormBlock& block, const void* x, const void* dy, void* dx,
                   const bool* mask, const BatchNormFactors& factors);
};

// The functions of the instruction set in use, see span.h.
const BatchNormSpanFunctions& CurrentBatchNormSpanFunctions();

}  // namespace accumops
