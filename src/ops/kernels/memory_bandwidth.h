// The STREAM triad, a = b + scale * c: what this machine's memory can do, to judge kernels by.
//
// Rates count the 12 bytes that a float32 value needs: two reads, one write. With plain stores the
// processor also reads each line of `a` before it writes it, which is not counted.
#pragma once

#include <cstdint>

#include "parallel_for.h"

namespace accumops {

void Triad(float* a, const float* b, const float* c, float scale, std::int64_t size, bool streaming,
           Executor& executor);

// Bytes per second, each the median over the repeats.
struct MemoryBandwidth {
  double plain;
  double streaming;
};

// Allocates three arrays, touched first by the executor's threads so that their pages lie on all of
// the memory that these threads are near to, and runs the two triads in turn. Throws std::bad_alloc
// where the memory is not there. `bytes_per_array` must be at least 4, `repeats` at least 1.
MemoryBandwidth MeasureMemoryBandwidth(std::int64_t bytes_per_array, int repeats,
                                       Executor& executor);

}  // namespace accumops
