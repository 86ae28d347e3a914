// Vectors of values and their way from memory and back, for the files that are compiled once for
// each instruction set. The vectors are the compiler's own: an instruction set with narrower ones
// takes several for each and computes the same. In an unnamed namespace, for the reason that
// elements.h gives.
#pragma once

#include <cstddef>
#include <cstdint>

#include "elements.h"

namespace accumops {
namespace ACCUMOPS_INSTRUCTION_SET {
namespace {

namespace internal {
template <typename Value, std::size_t kBytes>
struct Vector {
  using Type __attribute__((vector_size(kBytes))) = Value;
};
}  // namespace internal

template <typename Value, std::size_t kBytes>
using Vector = typename internal::Vector<Value, kBytes>::Type;

template <typename V, typename T>
V LoadAs(const T* from) {
  V vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

// A vector of the values from `from` on, each converted as by Widen().
template <typename V>
V LoadWide(const float* from) {
  return LoadAs<V>(from);
}
template <typename V>
V LoadWide(const double* from) {
  return LoadAs<V>(from);
}
// By intrinsics where there are any: __builtin_convertvector takes more instructions.
template <typename V>
V LoadWide(const BFloat16* from) {
  V values;
#if defined(__AVX512F__)
  static_assert(sizeof values == sizeof(__m512), "one register");
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  values = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#elif defined(__AVX2__)
  constexpr std::size_t kParts = sizeof values / sizeof(__m256);
  const auto* halves = reinterpret_cast<const __m128i*>(from);
  __m256i parts[kParts];
  for (std::size_t i = 0; i < kParts; ++i) {
    parts[i] = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(halves + i)), 16);
  }
  __builtin_memcpy(&values, parts, sizeof values);
#else
  using Halves = Vector<std::uint16_t, sizeof(V) / 2>;
  using Words = Vector<std::uint32_t, sizeof(V)>;
  const Words words = __builtin_convertvector(LoadAs<Halves>(from), Words) << 16;
  __builtin_memcpy(&values, &words, sizeof values);
#endif
  return values;
}
template <typename V>
V LoadWide(const Float16* from) {
  V values;
#if defined(__AVX512F__)
  static_assert(sizeof values == sizeof(__m512), "one register");
  values = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  constexpr std::size_t kParts = sizeof values / sizeof(__m256);
  const auto* halves = reinterpret_cast<const __m128i*>(from);
  __m256 parts[kParts];
  for (std::size_t i = 0; i < kParts; ++i) parts[i] = _mm256_cvtph_ps(_mm_loadu_si128(halves + i));
  __builtin_memcpy(&values, parts, sizeof values);
#else
  for (std::size_t i = 0; i < sizeof values / sizeof(float); ++i) values[i] = Widen(from[i]);
#endif
  return values;
}

// The bits that are stored of a vector, each value converted as by Narrow(). The pointer says to
// which type.
template <typename V>
V Pack(const float*, V values) {
  return values;
}
template <typename V>
V Pack(const double*, V values) {
  return values;
}
template <typename V>
auto Pack(const BFloat16*, V values) {
  using Words = Vector<std::uint32_t, sizeof(V)>;
  const auto words = LoadAs<Words>(&values);
  const Words rounded = words + 0x7fffu + ((words >> 16) & 1u);
  const Words quiet = words | 0x400000u;
  const Words bits = ((words & 0x7fffffffu) > 0x7f800000u ? quiet : rounded) >> 16;
  return __builtin_convertvector(bits, Vector<std::uint16_t, sizeof(V) / 2>);
}
template <typename V>
auto Pack(const Float16*, V values) {
  Vector<std::uint16_t, sizeof(V) / 2> halves;
#if defined(__AVX512F__)
  static_assert(sizeof values == sizeof(__m512), "one register");
  const __m256i bits = _mm512_cvtps_ph(LoadAs<__m512>(&values), _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(&halves, &bits, sizeof halves);
#elif defined(__F16C__)
  constexpr std::size_t kParts = sizeof values / sizeof(__m256);
  const auto* floats = reinterpret_cast<const float*>(&values);
  __m128i parts[kParts];
  for (std::size_t i = 0; i < kParts; ++i) {
    parts[i] = _mm256_cvtps_ph(_mm256_loadu_ps(floats + 8 * i), _MM_FROUND_TO_NEAREST_INT);
  }
  __builtin_memcpy(&halves, parts, sizeof halves);
#else
  for (std::size_t i = 0; i < sizeof values / sizeof(float); ++i) {
    halves[i] = Narrow<Float16>(values[i]).bits;
  }
#endif
  return halves;
}

// Stores past the caches, to an address that is aligned to the vector. FinishStreaming() has to
// follow before another thread reads it.
template <typename V>
void Stream(void* to, const V& vector) {
#if defined(__AVX512F__)
  if (sizeof vector == sizeof(__m512i)) {
    _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(&vector));
    return;
  }
#endif
#if defined(__AVX__)
  const auto* parts = reinterpret_cast<const __m256i*>(&vector);
  for (std::size_t i = 0; i < sizeof vector / sizeof(__m256i); ++i) {
    _mm256_stream_si256(static_cast<__m256i*>(to) + i, _mm256_loadu_si256(parts + i));
  }
#elif defined(__SSE2__)
  const auto* parts = reinterpret_cast<const __m128i*>(&vector);
  for (std::size_t i = 0; i < sizeof vector / sizeof(__m128i); ++i) {
    _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_loadu_si128(parts + i));
  }
#else
  __builtin_memcpy(to, &vector, sizeof vector);
#endif
}

inline void FinishStreaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <bool kStreaming, typename T, typename V>
void StoreNarrow(T* to, V values) {
  const auto packed = Pack(to, values);
  if (kStreaming) {
    Stream(to, packed);
  } else {
    __builtin_memcpy(to, &packed, sizeof packed);
  }
}

}  // namespace
}  // namespace ACCUMOPS_INSTRUCTION_SET
}  // namespace accumops
