// Adaptive gradient clipping (Brock et al., 2021, https://arxiv.org/abs/2102.06171, equation 3),
// for a list of tensors:
//
//   limit   = clip_factor * max(|weights|, epsilon)        norms of a unit
//   clipped = gradient * limit / |gradient|                if |gradient| > limit
//   clipped = gradient                                     elsewhere
//
// A tensor is a matrix of rows and units: a unit is a column. Norms and factors are float64, so
// that no square overflows. A unit with a gradient or weight that is not finite stays as it is.
// Values are added in an order that depends on the sizes alone: the same bits on every run and for
// any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "parallel_for.h"

struct CUstream_st;

namespace accumops {

struct ClipItem {
  const float* gradient;
  const float* weights;
  float* clipped;  // may be `gradient`
  std::int64_t rows;
  std::int64_t units;
};

struct ClipSettings {
  double clip_factor;
  double epsilon;
};

// The factor of a unit, from the sums of squares of its gradient and of its weights.
template <typename SquareRoot>
constexpr double ClipFactor(double gradient, double weights, const ClipSettings& settings,
                            SquareRoot square_root) {
  const double sum = gradient + weights;
  if (sum - sum != 0) return 1;  // not finite
  const double norm = square_root(weights);
  const double limit = settings.clip_factor * (norm > settings.epsilon ? norm : settings.epsilon);
  const double size = square_root(gradient);
  return size > limit ? limit / size : 1;
}

void ClipUnitsCpu(const ClipItem* items, std::size_t count, const ClipSettings& settings,
                  Executor& executor);

// Bytes of device memory that ClipUnitsCuda needs to work in, aligned to 16.
std::size_t ClipUnitsWorkspace(const ClipItem* items, std::size_t count);

// The items' values and the workspace are device memory; the item list itself is read before the
// call returns. Returns null, or the text of the CUDA error.
const char* ClipUnitsCuda(const ClipItem* items, std::size_t count, const ClipSettings& settings,
                          void* workspace, CUstream_st* stream);

}  // namespace accumops
