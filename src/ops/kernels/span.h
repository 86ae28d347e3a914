// The CPU's inner loops: one contiguous span on one thread. span.cc is compiled once for each
// instruction set; which of the three runs is decided once, by what the processor has.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace accumops {

struct Span {
  void* accumulator;
  const void* gradient;
  std::int64_t size;
  DType accumulator_dtype;
  DType gradient_dtype;
  double scale;
  bool overwrite;
  bool streaming;  // with overwrite: store past the caches
  bool check_finite;
};

// The sums of squares of a gradient, and of what it has made of its accumulator.
struct SpanNorms {
  double gradient = 0;
  double accumulator = 0;
};

struct BatchNormSpanFunctions;
struct ClipSpanFunctions;
struct UpdateSpanFunctions;

struct SpanFunctions {
  const char* instruction_set;
  const BatchNormSpanFunctions* batch_norm;
  const ClipSpanFunctions* clip;
  const UpdateSpanFunctions* update;
  // Returns false if `check_finite` and the gradient holds Inf or NaN.
  bool (*accumulate)(const Span& span);
  // The same, and adds to `norms` what it comes upon.
  bool (*accumulate_with_norms)(const Span& span, SpanNorms& norms);
  // a = b + scale * c, with plain or with non-temporal stores: the yardstick for bandwidth.
  void (*triad)(float* a, const float* b, const float* c, float scale, std::int64_t size,
                bool streaming);
};

namespace baseline {
extern const SpanFunctions kSpanFunctions;
}
namespace avx2 {
extern const SpanFunctions kSpanFunctions;
}
namespace avx512 {
extern const SpanFunctions kSpanFunctions;
}

// The functions in use: the widest that this processor runs, unless UseInstructionSet chose others.
const SpanFunctions& CurrentSpanFunctions();

// Chooses "baseline", "avx2" or "avx512" for the whole process, so that tests can reach each path
// on one machine. Returns false, and changes nothing, where this processor or build lacks it.
bool UseInstructionSet(const char* name);

}  // namespace accumops
