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

// What a column's values are normalized with, or what its gradients are made with. For `uniform`
// blocks, rows of a single channel, the arrays have one value; else one for each column. They are
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
  // Adds the block's moments to those of its columns, by Chan's formula: `mean` and `centred` are
  // of `*count` values and more. With a mask only the rows that it has count.
  void (*moments)(const BatchNormBlock& block, const void* x, const bool* mask, double* count,
                  double* mean, double* centred);
  // The same of one channel, whose values are all of the block's.
  void (*uniform_moments)(const BatchNormBlock& block, const void* x, double* count, double* mean,
                          double* centred);
  // Adds moments of `size` values a column to those of `count`, which the caller counts.
  void (*merge)(const double* mean, const double* centred, std::int64_t columns, double size,
                double count, double* merged_mean, double* merged_centred);
  // y = (x - shift) * scale + offset
  void (*normalize)(const BatchNormBlock& block, const void* x, void* y,
                    const BatchNormFactors& factors);
  // sum_dy += sum(dy), sum_product += sum(dy * (x - shift)), of each column or of all.
  void (*gradient_sums)(const BatchNormBlock& block, const void* x, const void* dy,
                        const BatchNormFactors& factors, double* sum_dy, double* sum_product);
  // dx = scale * dy + mask * (slope * (x - shift) + offset)
  void (*gradient)(const BatchNormBlock& block, const void* x, const void* dy, void* dx,
                   const bool* mask, const BatchNormFactors& factors);
};

// Those of the instruction set in use, see span.h.
const BatchNormSpanFunctions& CurrentBatchNormSpanFunctions();

}  // namespace accumops
