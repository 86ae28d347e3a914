// What nvcc and a build with ACCUMOPS_CUDA=EMULATED spell differently: parameters, shared memory,
// launches, and what CUDA has as PTX only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#if defined(ACCUMOPS_EMULATED_CUDA)

// A kernel's parameter. On the CPU by reference: each thread of a grid would copy it.
#define ACCUMOPS_PARAMS(...) const __VA_ARGS__&

// Declares a block's shared memory: ACCUMOPS_SHARED(name, type).
#define ACCUMOPS_SHARED(name, ...)                \
  using name##_type = __VA_ARGS__;                \
  static const char name##_key = 0;               \
  name##_type& name = *static_cast<name##_type*>( \
      emulated::SharedMemory(&name##_key, sizeof(name##_type), alignof(name##_type)))

#else

#define ACCUMOPS_PARAMS(...) const __grid_constant__ __VA_ARGS__
#define ACCUMOPS_SHARED(name, ...) \
  using name##_type = __VA_ARGS__; \
  __shared__ name##_type name

#endif

namespace accumops {
namespace cuda {

#if defined(ACCUMOPS_EMULATED_CUDA)

using emulated::Launch;

inline float HalfToFloat(std::uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return half;
}

inline std::uint16_t FloatToHalf(float x) {
  const auto half = static_cast<_Float16>(x);
  std::uint16_t bits;
  std::memcpy(&bits, &half, sizeof half);
  return bits;
}

// For a flag that several threads may set at once, all to the same value.
inline void SetFromAnyThread(bool* flag, bool value) {
  __atomic_store_n(flag, value, __ATOMIC_RELAXED);
}

#else

// Unlike <<<>>> followed by cudaGetLastError, never reports an error that an earlier call left
// behind; and it clears the error that it reports.
template <typename Params>
cudaError_t Launch(void (*kernel)(Params), std::int64_t blocks, int threads, const Params& params,
                   cudaStream_t stream) {
  void* arguments[] = {const_cast<Params*>(&params)};
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                       dim3(static_cast<unsigned>(threads)), arguments, 0, stream);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

inline __device__ float HalfToFloat(std::uint16_t bits) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
  return result;
}

inline __device__ std::uint16_t FloatToHalf(float x) {
  std::uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// For a flag that several threads may set at once, all to the same value.
inline __device__ void SetFromAnyThread(bool* flag, bool value) { *flag = value; }

#endif

}  // namespace cuda
}  // namespace accumops
