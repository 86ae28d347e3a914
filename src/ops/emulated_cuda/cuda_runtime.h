// What CUDA adds to C++ in a kernel, on a CPU; see cuda_runtime_api.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.h"
#include "cuda_runtime_api.h"

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)

#define threadIdx (emulated::ThreadIndex())
#define blockIdx (emulated::BlockIndex())
#define gridDim (emulated::GridSize())
#define __syncthreads() emulated::SyncThreads()

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulated {

// The value of another lane, or the lane's own where `from` is outside of its part of the warp.
template <typename T>
T Shuffle(WarpOperation operation, unsigned mask, T value, int from, int width) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t), "a lane gives one word");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const std::uint64_t* lanes = Exchange(operation, mask, bits);
  const int first = static_cast<int>(ThreadIndex().x) % kWarpSize / width * width;
  if (from >= first && from < first + width) bits = lanes[from];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulated

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = emulated::kWarpSize) {
  const int own = static_cast<int>(threadIdx.x) % emulated::kWarpSize;
  return emulated::Shuffle(emulated::WarpOperation::kShuffle, mask, value,
                           own / width * width + lane % width, width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = emulated::kWarpSize) {
  const int own = static_cast<int>(threadIdx.x) % emulated::kWarpSize;
  return emulated::Shuffle(emulated::WarpOperation::kShuffleUp, mask, value,
                           own - static_cast<int>(delta), width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = emulated::kWarpSize) {
  const int own = static_cast<int>(threadIdx.x) % emulated::kWarpSize;
  return emulated::Shuffle(emulated::WarpOperation::kShuffleDown, mask, value,
                           own + static_cast<int>(delta), width);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const std::uint64_t* lanes =
      emulated::Exchange(emulated::WarpOperation::kBallot, mask, predicate);
  unsigned result = 0;
  for (int i = 0; i < emulated::kWarpSize; ++i) {
    if ((mask >> i & 1) && lanes[i] != 0) result |= 1u << i;
  }
  return result;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

inline float __uint_as_float(unsigned x) {
  float result;
  std::memcpy(&result, &x, sizeof result);
  return result;
}
inline unsigned __float_as_uint(float x) {
  unsigned result;
  std::memcpy(&result, &x, sizeof result);
  return result;
}
inline int __double2hiint(double x) {
  std::uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<int>(bits >> 32);
}

// Compiled with -ffp-contract=off, so that nothing is contracted here either.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
using std::fma;
using std::sqrt;

template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}
