// Element types and their conversions, for the files that are compiled once for each instruction
// set. In an unnamed namespace, so that each of them has its own: the linker would keep one copy of
// any other inline function for all, possibly the AVX-512 one.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace accumops {
namespace ACCUMOPS_INSTRUCTION_SET {
namespace {

struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

inline float FromBits(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline float Widen(float value) { return value; }
inline double Widen(double value) { return value; }
inline float Widen(BFloat16 value) {
  return FromBits(static_cast<std::uint32_t>(value.bits) << 16);
}
#if defined(__F16C__)
inline float Widen(Float16 value) { return _cvtsh_ss(value.bits); }
#else
// Rebias the exponent; a subnormal becomes normal first and is corrected by a subtraction, so the
// result is the same with the processor set to flush subnormals, as it is on TensorFlow's threads.
inline float Widen(Float16 value) {
  constexpr std::uint32_t kExponent = 0x7c00u << 13;
  std::uint32_t bits = (value.bits & 0x7fffu) << 13;
  const std::uint32_t exponent = bits & kExponent;
  bits += (127 - 15) << 23;
  if (exponent == kExponent) bits += (128 - 16) << 23;
  float magnitude =
      exponent == 0 ? FromBits(bits + (1 << 23)) - FromBits(113 << 23) : FromBits(bits);
  std::uint32_t result;
  __builtin_memcpy(&result, &magnitude, sizeof result);
  return FromBits(result | (value.bits & 0x8000u) << 16);
}
#endif

inline std::uint32_t ToBits(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

// To the nearest, ties to even.
template <typename T>
T Narrow(float value);
template <>
inline float Narrow<float>(float value) {
  return value;
}
template <>
inline BFloat16 Narrow<BFloat16>(float value) {
  std::uint32_t bits = ToBits(value);
  bits =
      (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<std::uint16_t>(bits >> 16)};
}
template <>
inline Float16 Narrow<Float16>(float value) {
#if defined(__F16C__)
  return {static_cast<std::uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#else
  constexpr std::uint32_t kLeastNormal = 113u << 23;  // of float16
  std::uint32_t bits = ToBits(value);
  const std::uint32_t sign = bits & 0x80000000u;
  bits ^= sign;
  if (bits >= 143u << 23) {  // too large for float16, Inf or NaN
    bits = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (bits < kLeastNormal) {
    // The last bits of this sum's mantissa are the float16's bits, rounded by the processor.
    constexpr std::uint32_t kHalf = 126u << 23;
    bits = ToBits(FromBits(bits) + FromBits(kHalf)) - kHalf;
  } else {
    bits += 0xfffu + ((bits >> 13) & 1u) - (112u << 23);
    bits >>= 13;
  }
  return {static_cast<std::uint16_t>(bits | sign >> 16)};
#endif
}

}  // namespace
}  // namespace ACCUMOPS_INSTRUCTION_SET
}  // namespace accumops
