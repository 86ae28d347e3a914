// What the CUDA kernels share: element types, the rounding that accumulate.h promises, packs of
// elements that move in one access.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda_dialect.cuh"
#include "dtype.h"

namespace accumops {
namespace cuda {

// Only their bits are needed; cuda_fp16.h and cuda_bf16.h would add seconds to the build.
struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

inline __device__ float ToFloat(Float16 x) { return HalfToFloat(x.bits); }
inline __device__ float ToFloat(BFloat16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
inline __device__ float ToFloat(float x) { return x; }
inline __device__ double ToFloat(double x) { return x; }

// Looks at the bits: comparing doubles is slow where a GPU has few float64 units.
inline __device__ bool IsFinite(float x) {
  return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
}
inline __device__ bool IsFinite(double x) {
  return (static_cast<unsigned>(__double2hiint(x)) & 0x7ff00000u) != 0x7ff00000u;
}

// Never contracted into an FMA, whatever the compiler's flags.
inline __device__ float Multiply(float a, float b) { return __fmul_rn(a, b); }
inline __device__ double Multiply(double a, double b) { return __dmul_rn(a, b); }
inline __device__ float Add(float a, float b) { return __fadd_rn(a, b); }
inline __device__ double Add(double a, double b) { return __dadd_rn(a, b); }
inline __device__ float Subtract(float a, float b) { return __fsub_rn(a, b); }

// A float32 scale survives the detour through float64 unchanged.
inline __device__ double ReadScale(const DeviceScalar& scale) {
  return scale.dtype == DType::kFloat64 ? *static_cast<const double*>(scale.data)
                                        : *static_cast<const float*>(scale.data);
}

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;  // of a warp

constexpr int kVectorBytes = 16;

// How many accumulator elements one 16-byte access moves; a pack of the gradient has as many.
template <typename Acc>
constexpr int kPackSize = kVectorBytes / static_cast<int>(sizeof(Acc));

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Pack {
  T value[kSize];
};

namespace internal {
template <std::size_t kBytes>
struct Word;
template <>
struct Word<4> {
  using Type = unsigned;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};
}  // namespace internal

template <typename P>
using WordOf = typename internal::Word<sizeof(P)>::Type;

template <typename P>
__device__ P LoadPack(const P* from) {
  const WordOf<P> word = *reinterpret_cast<const WordOf<P>*>(from);
  P result;
  std::memcpy(&result, &word, sizeof(P));
  return result;
}

// Loads what is read once, and leaves the cache to other data.
template <typename P>
__device__ P LoadPackOnce(const P* from) {
  const WordOf<P> word = __ldcs(reinterpret_cast<const WordOf<P>*>(from));
  P result;
  std::memcpy(&result, &word, sizeof(P));
  return result;
}

template <typename P>
__device__ void StorePack(P* to, const P& pack) {
  WordOf<P> word;
  std::memcpy(&word, &pack, sizeof(P));
  *reinterpret_cast<WordOf<P>*>(to) = word;
}

inline const char* ErrorText(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace accumops
