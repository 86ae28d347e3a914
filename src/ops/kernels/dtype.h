// The element types that the kernels read and write, and a scalar of one of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace accumops {

enum class DType : std::uint8_t { kFloat16, kBFloat16, kFloat32, kFloat64 };

constexpr std::size_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
  }
  return 0;
}

// Accumulators are float32 or float64, and never narrower than the gradient.
constexpr bool CanAccumulate(DType accumulator, DType gradient) {
  return accumulator == DType::kFloat64 ||
         (accumulator == DType::kFloat32 && gradient != DType::kFloat64);
}

// A scalar that a CUDA kernel reads from device memory.
struct DeviceScalar {
  const void* data;
  DType dtype;  // kFloat32 or kFloat64
};

}  // namespace accumops
