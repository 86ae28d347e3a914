// Compiled once for each instruction set, with ACCUMOPS_INSTRUCTION_SET naming the namespace. Plain
// loops over arrays that the compiler turns into vectors; see CMakeLists.txt for what it may
// assume. No inline function of the standard library, for the reason that elements.h gives.
#include "update_span.h"

#include "elements.h"

namespace accumops {
namespace ACCUMOPS_INSTRUCTION_SET {
namespace {

// So many gradients are made at a time, in the L1 cache, and used from there.
constexpr std::int64_t kRun = 256;

// The processor's own prefetcher stops at each 4 KiB page; TensorFlow's memory has no larger ones.
constexpr std::int64_t kAhead = 512;  // values
constexpr std::int64_t kCacheLine = 64;

template <typename T>
void Prefetch(const T* from, std::int64_t size) {
  const char* p = reinterpret_cast<const char*>(from + kAhead);
  const auto bytes = size * static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(p + i);
}

// gradient = scale * (accumulator + weight * latest), where either summand may be missing.
template <bool kAccumulated, bool kLatest, typename T>
void ScaledSum(const UpdateSpan& span, std::int64_t begin, std::int64_t size,
               float* __restrict gradient) {
  const float* __restrict accumulator = kAccumulated ? span.accumulator + begin : nullptr;
  const T* __restrict latest = kLatest ? static_cast<const T*>(span.latest) + begin : nullptr;
  const float scale = span.scale;
  const float weight = span.weight;
  if (kAccumulated) Prefetch(accumulator, size);
  if (kLatest) Prefetch(latest, size);
  for (std::int64_t i = 0; i < size; ++i) {
    float sum = kAccumulated ? accumulator[i] : 0.0f;
    if (kLatest) {
      const float product = weight * Widen(latest[i]);
      sum = kAccumulated ? sum + product : product;
    }
    gradient[i] = scale * sum;
  }
}

template <typename T>
void ScaledSumWithLatest(const UpdateSpan& span, std::int64_t begin, std::int64_t size,
                         float* __restrict gradient) {
  if (span.accumulator == nullptr) {
    ScaledSum<false, true, T>(span, begin, size, gradient);
  } else {
    ScaledSum<true, true, T>(span, begin, size, gradient);
  }
}

// The gradients of `size` values from `begin` on.
void FindGradients(const UpdateSpan& span, std::int64_t begin, std::int64_t size, float clip,
                   float* __restrict gradient) {
  if (span.latest == nullptr) {
    if (span.accumulator == nullptr) {
      ScaledSum<false, false, float>(span, begin, size, gradient);
    } else {
      ScaledSum<true, false, float>(span, begin, size, gradient);
    }
  } else if (span.latest_dtype == DType::kFloat16) {
    ScaledSumWithLatest<Float16>(span, begin, size, gradient);
  } else if (span.latest_dtype == DType::kBFloat16) {
    ScaledSumWithLatest<BFloat16>(span, begin, size, gradient);
  } else {
    ScaledSumWithLatest<float>(span, begin, size, gradient);
  }
  if (clip == 0) return;
  for (std::int64_t i = 0; i < size; ++i) {
    const float g = gradient[i];
    const float above = g > clip ? clip : g;
    gradient[i] = above < -clip ? -clip : above;
  }
}

// Step() is a rule's step for one value: x is the value after its decay, g its gradient, and
// `slots` are its m, v and w.
struct Sgd {
  static constexpr int kSlots = 0;
  static float Step(float x, float g, float*, float rate, const UpdateSettings&) {
    return x - rate * g;
  }
};

template <bool kNesterov>
struct Momentum {
  static constexpr int kSlots = 1;
  static float Step(float x, float g, float* slots, float rate, const UpdateSettings& settings) {
    const float step = rate * g;
    const float m = slots[0] * settings.beta_1 - step;
    slots[0] = m;
    return kNesterov ? x + (m * settings.beta_1 - step) : x + m;
  }
};

template <bool kAmsgrad>
struct Adam {
  static constexpr int kSlots = kAmsgrad ? 3 : 2;
  static float Step(float x, float g, float* slots, float rate, const UpdateSettings& settings) {
    const float m = slots[0] + (g - slots[0]) * settings.new_1;
    const float v = slots[1] + (g * g - slots[1]) * settings.new_2;
    slots[0] = m;
    slots[1] = v;
    float under = v;
    if (kAmsgrad) {
      const float w = slots[2];
      under = (w > v) | (w != w) ? w : v;
      slots[2] = under;
    }
    return x - m * rate / (__builtin_sqrtf(under) + settings.epsilon);
  }
};

struct Lion {
  static constexpr int kSlots = 1;
  static float Step(float x, float g, float* slots, float rate, const UpdateSettings& settings) {
    const float m = slots[0];
    const float direction = m * settings.beta_1 + g * settings.new_1;
    const float below = direction < 0 ? -1.0f : direction;
    const float sign = direction > 0 ? 1.0f : below;
    slots[0] = m * settings.beta_2 + g * settings.new_2;
    return x - rate * sign;
  }
};

template <typename Rule>
void UpdateRun(const UpdateSpan& span, std::int64_t begin, std::int64_t size,
               const UpdateSettings& given, const float* __restrict gradient) {
  const UpdateSettings settings = given;
  const float rate = span.rate;
  const float decay = span.decay;
  const bool decays = span.decays;
  float* __restrict value = span.value + begin;
  float* __restrict m = Rule::kSlots > 0 ? span.slots[0] + begin : nullptr;
  float* __restrict v = Rule::kSlots > 1 ? span.slots[1] + begin : nullptr;
  float* __restrict w = Rule::kSlots > 2 ? span.slots[2] + begin : nullptr;
  Prefetch(value, size);
  if (Rule::kSlots > 0) Prefetch(m, size);
  if (Rule::kSlots > 1) Prefetch(v, size);
  if (Rule::kSlots > 2) Prefetch(w, size);
  for (std::int64_t i = 0; i < size; ++i) {
    float slots[kMaxSlots] = {Rule::kSlots > 0 ? m[i] : 0, Rule::kSlots > 1 ? v[i] : 0,
                              Rule::kSlots > 2 ? w[i] : 0};
    const float x = decays ? value[i] - value[i] * decay : value[i];
    value[i] = Rule::Step(x, gradient[i], slots, rate, settings);
    if (Rule::kSlots > 0) m[i] = slots[0];
    if (Rule::kSlots > 1) v[i] = slots[1];
    if (Rule::kSlots > 2) w[i] = slots[2];
  }
}

template <typename Rule>
void UpdateSpanOf(const UpdateSpan& span, const UpdateSettings& settings) {
  alignas(kCacheLine) float gradient[kRun];
  for (std::int64_t begin = 0; begin < span.size; begin += kRun) {
    const std::int64_t left = span.size - begin;
    const std::int64_t size = left < kRun ? left : kRun;
    FindGradients(span, begin, size, settings.clip, gradient);
    UpdateRun<Rule>(span, begin, size, settings, gradient);
  }
}

void Update(const UpdateSpan& span, const UpdateSettings& settings) {
  switch (settings.rule) {
    case UpdateRule::kSgd:
      return UpdateSpanOf<Sgd>(span, settings);
    case UpdateRule::kMomentum:
      return UpdateSpanOf<Momentum<false>>(span, settings);
    case UpdateRule::kNesterov:
      return UpdateSpanOf<Momentum<true>>(span, settings);
    case UpdateRule::kAdam:
      return UpdateSpanOf<Adam<false>>(span, settings);
    case UpdateRule::kAmsgrad:
      return UpdateSpanOf<Adam<true>>(span, settings);
    case UpdateRule::kLion:
      return UpdateSpanOf<Lion>(span, settings);
  }
}

// Vectors of the compiler's own, which every instruction set makes of what it has: so all
// instruction sets add in the same order.
constexpr std::int64_t kLanes = 4;
using Doubles __attribute__((vector_size(32))) = double;
using Floats __attribute__((vector_size(16))) = float;

inline Doubles LoadDoubles(const double* from) {
  Doubles result;
  __builtin_memcpy(&result, from, sizeof result);
  return result;
}
inline Doubles LoadDoubles(const float* from) {
  Floats result;
  __builtin_memcpy(&result, from, sizeof result);
  return __builtin_convertvector(result, Doubles);
}
template <typename T>
Doubles LoadDoubles(const T* from) {
  Floats result;
  for (std::int64_t k = 0; k < kLanes; ++k) result[k] = Widen(from[k]);
  return __builtin_convertvector(result, Doubles);
}

template <typename T>
double SquaredNormOf(const T* values, std::int64_t size) {
  constexpr std::int64_t kSums = 8;
  Doubles sums[kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums * kLanes <= size; i += kSums * kLanes) {
    Prefetch(values + i, kSums * kLanes);
    for (std::int64_t k = 0; k < kSums; ++k) {
      const Doubles value = LoadDoubles(values + i + k * kLanes);
      sums[k] += value * value;
    }
  }
  double total = 0;
  for (; i < size; ++i) {
    const double value = static_cast<double>(Widen(values[i]));
    total += value * value;
  }
  Doubles sum = {};
  for (const Doubles& each : sums) sum += each;
  for (std::int64_t k = 0; k < kLanes; ++k) total += sum[k];
  return total;
}

double SquaredNorm(const void* values, std::int64_t size, DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return SquaredNormOf(static_cast<const Float16*>(values), size);
    case DType::kBFloat16:
      return SquaredNormOf(static_cast<const BFloat16*>(values), size);
    case DType::kFloat32:
      return SquaredNormOf(static_cast<const float*>(values), size);
    case DType::kFloat64:
      return SquaredNormOf(static_cast<const double*>(values), size);
  }
  return 0;
}

}  // namespace

extern const UpdateSpanFunctions kUpdateSpanFunctions;
const UpdateSpanFunctions kUpdateSpanFunctions = {Update, SquaredNorm};

}  // namespace ACCUMOPS_INSTRUCTION_SET
}  // namespace accumops
