// Compiled once for each instruction set, with ACCUMOPS_INSTRUCTION_SET naming the namespace. Plain
// loops over arrays that the compiler turns into vectors. No inline function of the standard
// library, for the reason that elements.h gives.
#include "clip_span.h"

namespace accumops {
namespace ACCUMOPS_INSTRUCTION_SET {
namespace {

// A matrix of few units is short in its inner loop: then so many rows are taken for one.
constexpr std::int64_t kFewUnits = 16;
constexpr std::int64_t kSums = 64;

// Rows that lie side by side, as rows of kSums / units times as many units.
void FewColumnSquares(const float* values, const ClipRows& shape, double* __restrict sums) {
  double wide[kSums] = {};
  const std::int64_t together = kSums / shape.units;
  const std::int64_t width = together * shape.units;
  std::int64_t row = 0;
  for (; row + together <= shape.rows; row += together, values += width) {
    for (std::int64_t k = 0; k < width; ++k) {
      const double value = static_cast<double>(values[k]);
      wide[k] += value * value;
    }
  }
  const std::int64_t rest = (shape.rows - row) * shape.units;
  for (std::int64_t k = 0; k < rest; ++k) {
    const double value = static_cast<double>(values[k]);
    wide[k] += value * value;
  }
  for (std::int64_t unit = 0; unit < shape.units; ++unit) {
    double sum = 0;
    for (std::int64_t k = unit; k < width; k += shape.units) sum += wide[k];
    sums[unit] = sum;
  }
}

void ColumnSquares(const float* values, const ClipRows& shape, double* __restrict sums) {
  if (shape.units <= kFewUnits && shape.stride == shape.units) {
    FewColumnSquares(values, shape, sums);
    return;
  }
  for (std::int64_t unit = 0; unit < shape.units; ++unit) sums[unit] = 0;
  for (std::int64_t row = 0; row < shape.rows; ++row, values += shape.stride) {
    for (std::int64_t unit = 0; unit < shape.units; ++unit) {
      const double value = static_cast<double>(values[unit]);
      sums[unit] += value * value;
    }
  }
}

void ScaleColumns(const float* from, float* to, const ClipRows& shape, const double* factors) {
  for (std::int64_t row = 0; row < shape.rows; ++row, from += shape.stride, to += shape.stride) {
    for (std::int64_t unit = 0; unit < shape.units; ++unit) {
      to[unit] = static_cast<float>(static_cast<double>(from[unit]) * factors[unit]);
    }
  }
}

}  // namespace

extern const ClipSpanFunctions kClipSpanFunctions;
const ClipSpanFunctions kClipSpanFunctions = {ColumnSquares, ScaleColumns};

}  // namespace ACCUMOPS_INSTRUCTION_SET
}  // namespace accumops
