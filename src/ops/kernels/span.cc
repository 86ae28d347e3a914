// Compiled once for each instruction set, with ACCUMOPS_INSTRUCTION_SET naming the namespace.
#include "span.h"

#include "elements.h"
#include "lanes.h"
#include "squares.h"

#define ACCUMOPS_STRING_(x) #x
#define ACCUMOPS_STRING(x) ACCUMOPS_STRING_(x)

namespace accumops {
namespace ACCUMOPS_INSTRUCTION_SET {
namespace {

// Looks at the bits: comparisons of floats would not survive -ffinite-math, and integers vectorise
// as a reduction.
bool IsFinite(Float16 value) { return (value.bits & 0x7c00) != 0x7c00; }
bool IsFinite(BFloat16 value) { return (value.bits & 0x7f80) != 0x7f80; }
bool IsFinite(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return (bits & 0x7f800000u) != 0x7f800000u;
}
bool IsFinite(double value) {
  std::uint64_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return (bits & 0x7ff0000000000000u) != 0x7ff0000000000000u;
}

template <bool kOverwrite, bool kCheck, typename Accumulator, typename Gradient>
bool AccumulateScalar(Accumulator* accumulator, const Gradient* gradient, std::int64_t begin,
                      std::int64_t end, Accumulator scale) {
  unsigned bad = 0;
  for (std::int64_t i = begin; i < end; ++i) {
    const Accumulator product = scale * static_cast<Accumulator>(Widen(gradient[i]));
    accumulator[i] = kOverwrite ? product : accumulator[i] + product;
    if (kCheck) bad |= !IsFinite(gradient[i]);
  }
  return bad == 0;
}

// Lanes: a vector of float32 as wide as the registers, and a record of its non-finite values.
#if defined(__AVX512F__)
#define ACCUMOPS_VECTORS 1
using Lanes = Vector<float, 64>;
using Record = __mmask16;
Record NoRecord() { return 0; }
// Quiet NaN, signalling NaN, +Inf, -Inf.
Record Note(Record r, Lanes x) { return r | _mm512_fpclass_ps_mask(x, 0x01 | 0x80 | 0x08 | 0x10); }
bool Clean(Record r) { return r == 0; }
#elif defined(__AVX2__)
#define ACCUMOPS_VECTORS 1
using Lanes = Vector<float, 32>;
using Record = Lanes;
Record NoRecord() { return Record{}; }
Record Note(Record r, Lanes x) {
  const Lanes magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
  const Lanes infinity = _mm256_set1_ps(__builtin_inff());
  return _mm256_or_ps(r, _mm256_cmp_ps(magnitude, infinity, _CMP_NLT_UQ));
}
bool Clean(Record r) { return _mm256_movemask_ps(r) == 0; }
#endif

#if defined(ACCUMOPS_VECTORS)
constexpr std::int64_t kLanes = sizeof(Lanes) / sizeof(float);
constexpr std::uintptr_t kCacheLine = 64;

// Elements before `p` reaches a cache line, so that no store splits one and streaming stores are
// aligned.
std::int64_t Head(const float* p, std::int64_t size) {
  const std::uintptr_t misaligned = reinterpret_cast<std::uintptr_t>(p) % kCacheLine;
  const auto head =
      static_cast<std::int64_t>((kCacheLine - misaligned) % kCacheLine / sizeof(float));
  return head < size ? head : size;
}

// The processor's own prefetcher stops at each 4 KiB page; TensorFlow's memory has no larger ones.
constexpr std::int64_t kAhead = 512;  // elements
// Inlined at once: GCC takes a call of it for one that does nothing.
__attribute__((always_inline)) inline void Prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

struct Accumulated {
  Lanes gradient, result;
};

// Accumulates the vector from element i on.
template <bool kOverwrite, bool kStreaming, bool kCheck, typename Gradient>
__attribute__((always_inline)) inline Accumulated AccumulateVector(float* accumulator,
                                                                   const Gradient* gradient,
                                                                   std::int64_t i, Lanes factor,
                                                                   Record& record) {
  Prefetch(gradient + i + kAhead);
  if (!kOverwrite) Prefetch(accumulator + i + kAhead);
  const Lanes g = LoadWide<Lanes>(gradient + i);
  if (kCheck) record = Note(record, g);
  const Lanes product = factor * g;
  const Lanes result = kOverwrite ? product : LoadWide<Lanes>(accumulator + i) + product;
  StoreNarrow<kStreaming>(accumulator + i, result);
  return {g, result};
}

Lanes FactorOf(float scale) {
  return scale - Lanes{};
}  // scale + Lanes{} would lose the sign of -0

template <bool kOverwrite, bool kStreaming, bool kCheck, typename Gradient>
bool AccumulateVectors(float* accumulator, const Gradient* gradient, std::int64_t size,
                       float scale) {
  constexpr std::int64_t kUnroll = 4;
  const Lanes factor = FactorOf(scale);
  Record record = NoRecord();
  const auto step = [&](std::int64_t i) __attribute__((always_inline)) {
    AccumulateVector<kOverwrite, kStreaming, kCheck>(accumulator, gradient, i, factor, record);
  };
  const std::int64_t head = Head(accumulator, size);
  bool finite = AccumulateScalar<kOverwrite, kCheck>(accumulator, gradient, 0, head, scale);
  std::int64_t i = head;
  for (; i + kUnroll * kLanes <= size; i += kUnroll * kLanes) {
    for (std::int64_t u = 0; u < kUnroll; ++u) step(i + u * kLanes);
  }
  for (; i + kLanes <= size; i += kLanes) step(i);
  finite &= AccumulateScalar<kOverwrite, kCheck>(accumulator, gradient, i, size, scale);
  if (kStreaming) FinishStreaming();
  return finite && Clean(record);
}

// Accumulates a run whose accumulator begins at a cache line. The squares are those of squares.h.
template <bool kOverwrite, bool kStreaming, bool kCheck, typename Gradient>
bool AccumulateRun(float* accumulator, const Gradient* gradient, float scale, SpanNorms& norms) {
  constexpr std::int64_t kSums = kSquareSums / kLanes;
  const Lanes factor = FactorOf(scale);
  Record record = NoRecord();
  Lanes of_gradient[kSums] = {}, of_accumulator[kSums] = {};
  for (std::int64_t i = 0; i < kSquaresRun; i += kSquareSums) {
    for (std::int64_t k = 0; k < kSums; ++k) {
      const Accumulated each = AccumulateVector<kOverwrite, kStreaming, kCheck>(
          accumulator, gradient, i + k * kLanes, factor, record);
      of_gradient[k] += each.gradient * each.gradient;
      of_accumulator[k] += each.result * each.result;
    }
  }
  float sums[kSquareSums];
  __builtin_memcpy(sums, of_gradient, sizeof sums);
  norms.gradient += TotalOf(sums, gradient, kSquaresRun, 1);
  __builtin_memcpy(sums, of_accumulator, sizeof sums);
  // Streamed values are in no cache; the same products are made once more.
  norms.accumulator += kStreaming ? TotalOf(sums, gradient, kSquaresRun, scale)
                                  : TotalOf(sums, accumulator, kSquaresRun, 1);
  return Clean(record);
}
#endif

// A scale of 0: the gradient is not multiplied, as 0 * Inf is NaN.
template <bool kOverwrite, bool kCheck, typename Accumulator, typename Gradient>
bool AccumulateNothing(Accumulator* accumulator, const Gradient* gradient, std::int64_t size) {
  if (kOverwrite) {
    for (std::int64_t i = 0; i < size; ++i) accumulator[i] = 0;
  }
  unsigned bad = 0;
  if (kCheck) {
    for (std::int64_t i = 0; i < size; ++i) bad |= !IsFinite(gradient[i]);
  }
  return bad == 0;
}

template <bool kOverwrite, bool kCheck, typename Gradient>
bool AccumulateTyped(const Span& span, float* accumulator, const Gradient* gradient) {
  const float scale = static_cast<float>(span.scale);
  if (scale == 0) return AccumulateNothing<kOverwrite, kCheck>(accumulator, gradient, span.size);
#if defined(ACCUMOPS_VECTORS)
  return kOverwrite && span.streaming ? AccumulateVectors<kOverwrite, kOverwrite, kCheck>(
                                            accumulator, gradient, span.size, scale)
                                      : AccumulateVectors<kOverwrite, false, kCheck>(
                                            accumulator, gradient, span.size, scale);
#else
  return AccumulateScalar<kOverwrite, kCheck>(accumulator, gradient, 0, span.size, scale);
#endif
}

template <bool kOverwrite, bool kCheck, typename Gradient>
bool AccumulateTyped(const Span& span, double* accumulator, const Gradient* gradient) {
  if (span.scale == 0) {
    return AccumulateNothing<kOverwrite, kCheck>(accumulator, gradient, span.size);
  }
  return AccumulateScalar<kOverwrite, kCheck>(accumulator, gradient, 0, span.size, span.scale);
}

template <typename Accumulator, typename Gradient>
bool AccumulateFlags(const Span& span) {
  auto* accumulator = static_cast<Accumulator*>(span.accumulator);
  const auto* gradient = static_cast<const Gradient*>(span.gradient);
  if (span.overwrite) {
    return span.check_finite ? AccumulateTyped<true, true>(span, accumulator, gradient)
                             : AccumulateTyped<true, false>(span, accumulator, gradient);
  }
  return span.check_finite ? AccumulateTyped<false, true>(span, accumulator, gradient)
                           : AccumulateTyped<false, false>(span, accumulator, gradient);
}

template <typename Accumulator>
bool AccumulateGradient(const Span& span) {
  switch (span.gradient_dtype) {
    case DType::kFloat16:
      return AccumulateFlags<Accumulator, Float16>(span);
    case DType::kBFloat16:
      return AccumulateFlags<Accumulator, BFloat16>(span);
    case DType::kFloat32:
      return AccumulateFlags<Accumulator, float>(span);
    case DType::kFloat64:
      break;
  }
  return AccumulateFlags<double, double>(span);  // the one float64 pair that CanAccumulate allows
}

bool Accumulate(const Span& span) {
  return span.accumulator_dtype == DType::kFloat64 ? AccumulateGradient<double>(span)
                                                   : AccumulateGradient<float>(span);
}

// Accumulates a run or less, and then reads what is still in the caches once more.
bool AccumulateThenSquares(const Span& span, SpanNorms& norms) {
  const bool finite = Accumulate(span);
  norms.gradient += Squares(span.gradient, span.size, span.gradient_dtype, 1);
  norms.accumulator +=
      span.streaming
          ? Squares(span.gradient, span.size, span.gradient_dtype, static_cast<float>(span.scale))
          : Squares(span.accumulator, span.size, span.accumulator_dtype, 1);
  return finite;
}

using RunFunction = bool (*)(const Span& span, SpanNorms& norms);

#if defined(ACCUMOPS_VECTORS)
template <typename Gradient, bool kOverwrite, bool kStreaming, bool kCheck>
bool RunOf(const Span& span, SpanNorms& norms) {
  return AccumulateRun<kOverwrite, kStreaming, kCheck>(static_cast<float*>(span.accumulator),
                                                       static_cast<const Gradient*>(span.gradient),
                                                       static_cast<float>(span.scale), norms);
}

template <typename Gradient>
RunFunction RunWithFlags(const Span& span) {
  if (!span.overwrite) {
    return span.check_finite ? RunOf<Gradient, false, false, true>
                             : RunOf<Gradient, false, false, false>;
  }
  if (!span.streaming) {
    return span.check_finite ? RunOf<Gradient, true, false, true>
                             : RunOf<Gradient, true, false, false>;
  }
  return span.check_finite ? RunOf<Gradient, true, true, true> : RunOf<Gradient, true, true, false>;
}
#endif

// What accumulates each whole run of a span.
RunFunction RunFunctionOf(const Span& span) {
#if defined(ACCUMOPS_VECTORS)
  const auto* accumulator = static_cast<const float*>(span.accumulator);
  if (span.accumulator_dtype == DType::kFloat32 && static_cast<float>(span.scale) != 0 &&
      Head(accumulator, span.size) == 0) {
    switch (span.gradient_dtype) {
      case DType::kFloat16:
        return RunWithFlags<Float16>(span);
      case DType::kBFloat16:
        return RunWithFlags<BFloat16>(span);
      case DType::kFloat32:
        return RunWithFlags<float>(span);
      case DType::kFloat64:
        break;
    }
  }
#else
  (void)span;
#endif
  return AccumulateThenSquares;
}

bool AccumulateWithNorms(const Span& span, SpanNorms& norms) {
  const RunFunction run = RunFunctionOf(span);
  bool finite = true;
  Span piece = span;
  for (std::int64_t begin = 0; begin < span.size; begin += kSquaresRun) {
    piece.size = span.size - begin < kSquaresRun ? span.size - begin : kSquaresRun;
    finite &= (piece.size == kSquaresRun ? run : AccumulateThenSquares)(piece, norms);
    piece.accumulator = static_cast<char*>(piece.accumulator) +
                        kSquaresRun * static_cast<std::int64_t>(SizeOf(span.accumulator_dtype));
    piece.gradient = static_cast<const char*>(piece.gradient) +
                     kSquaresRun * static_cast<std::int64_t>(SizeOf(span.gradient_dtype));
  }
#if defined(ACCUMOPS_VECTORS)
  if (span.streaming) FinishStreaming();
#endif
  return finite;
}

void Triad(float* a, const float* b, const float* c, float scale, std::int64_t size,
           bool streaming) {
  std::int64_t i = 0;
#if defined(ACCUMOPS_VECTORS)
  const Lanes factor = scale - Lanes{};
  const auto sum = [&](std::int64_t at) __attribute__((always_inline)) {
    return LoadWide<Lanes>(b + at) + factor * LoadWide<Lanes>(c + at);
  };
  if (streaming) {
    for (const std::int64_t head = Head(a, size); i < head; ++i) a[i] = b[i] + scale * c[i];
    for (; i + kLanes <= size; i += kLanes) StoreNarrow<true>(a + i, sum(i));
    FinishStreaming();
  } else {
    for (; i + kLanes <= size; i += kLanes) StoreNarrow<false>(a + i, sum(i));
  }
#else
  (void)streaming;
#endif
  for (; i < size; ++i) a[i] = b[i] + scale * c[i];
}

}  // namespace

extern const BatchNormSpanFunctions kBatchNormSpanFunctions;
extern const ClipSpanFunctions kClipSpanFunctions;
extern const UpdateSpanFunctions kUpdateSpanFunctions;
extern const SpanFunctions kSpanFunctions;
const SpanFunctions kSpanFunctions = {ACCUMOPS_STRING(ACCUMOPS_INSTRUCTION_SET),
                                      &kBatchNormSpanFunctions,
                                      &kClipSpanFunctions,
                                      &kUpdateSpanFunctions,
                                      Accumulate,
                                      AccumulateWithNorms,
                                      Triad};

}  // namespace ACCUMOPS_INSTRUCTION_SET
}  // namespace accumops
