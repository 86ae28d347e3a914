// Sums of squares of float32 values, for the files that are compiled once for each instruction set:
// all of them give the same bits. Values are taken in runs. Within a run squares are added in
// float32, which is several times faster than in float64; the sums of runs are float64. A run whose
// squares leave the range of float32 is added in float64. In an unnamed namespace, for the reason
// that elements.h gives.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "elements.h"

namespace accumops {
namespace ACCUMOPS_INSTRUCTION_SET {
namespace {

// The sums of a run: value i is added to sum i % kSquareSums.
constexpr std::int64_t kSquareSums = 32;
constexpr std::int64_t kSquaresRun = 512;
// A smaller total may lack squares that are too small for float32, each of less than 1.2e-38, and a
// larger one may have overflowed.
constexpr double kLeastSquares = 1e-28;
constexpr double kMostSquares = 1e38;

// The sum of squares of scale * values, in float64.
template <typename T>
double WideSquares(const T* values, std::int64_t size, float scale) {
  double total = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    const double value = static_cast<double>(scale * Widen(values[i]));
    total += value * value;
  }
  return total;
}

// The sum of squares of scale * values, from the sums that were made of them.
template <typename T>
double TotalOf(const float (&sums)[kSquareSums], const T* values, std::int64_t size, float scale) {
  double parts[kSquareSums];
  for (std::int64_t k = 0; k < kSquareSums; ++k) parts[k] = static_cast<double>(sums[k]);
  for (std::int64_t width = kSquareSums / 2; width > 0; width /= 2) {
    for (std::int64_t k = 0; k < width; ++k) parts[k] += parts[k + width];
  }
  // False for a NaN, too.
  const bool in_range = parts[0] >= kLeastSquares && parts[0] <= kMostSquares;
  return in_range ? parts[0] : WideSquares(values, size, scale);
}

// The sum of squares of scale * values, of a run or less. Float64 values are not scaled.
template <typename T>
double Squares(const T* values, std::int64_t size, float scale) {
  const std::int64_t whole = size / kSquareSums * kSquareSums;
  double total = 0;
  if (whole > 0) {
    float sums[kSquareSums] = {};
    for (std::int64_t i = 0; i < whole; i += kSquareSums) {
      for (std::int64_t k = 0; k < kSquareSums; ++k) {
        const float value = scale * Widen(values[i + k]);
        sums[k] += value * value;
      }
    }
    total = TotalOf(sums, values, whole, scale);
  }
  return total + WideSquares(values + whole, size - whole, scale);
}
inline double Squares(const double* values, std::int64_t size, float) {
  double total = 0;
  for (std::int64_t i = 0; i < size; ++i) total += values[i] * values[i];
  return total;
}

inline double Squares(const void* values, std::int64_t size, DType dtype, float scale) {
  switch (dtype) {
    case DType::kFloat16:
      return Squares(static_cast<const Float16*>(values), size, scale);
    case DType::kBFloat16:
      return Squares(static_cast<const BFloat16*>(values), size, scale);
    case DType::kFloat32:
      return Squares(static_cast<const float*>(values), size, scale);
    case DType::kFloat64:
      return Squares(static_cast<const double*>(values), size, scale);
  }
  return 0;
}

}  // namespace
}  // namespace ACCUMOPS_INSTRUCTION_SET
}  // namespace accumops
