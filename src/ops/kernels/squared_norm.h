// The sum of squares of each tensor of a list, in one pass over all of them.
//
// Squares and sums are float64, so that no finite float32 overflows: a sum is finite where every
// value is. Values are added in an order that depends on the sizes alone: the same bits on every
// run and for any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"
#include "parallel_for.h"

struct CUstream_st;

namespace accumops {

struct SquaredNormItem {
  const void* values;
  std::int64_t size;
  DType dtype;
};

void SquaredNormsCpu(const SquaredNormItem* items, std::size_t count, double* sums,
                     Executor& executor);

// Bytes of device memory that SquaredNormsCuda needs to work in, aligned to 16.
std::size_t SquaredNormsWorkspace(const SquaredNormItem* items, std::size_t count);

// The items' values, `sums` and the workspace are device memory; the item list itself is read
// before the call returns. Returns null, or the text of the CUDA error.
const char* SquaredNormsCuda(const SquaredNormItem* items, std::size_t count, double* sums,
                             void* workspace, CUstream_st* stream);

}  // namespace accumops
