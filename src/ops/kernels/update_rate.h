// The correction of Adam's rate for the bias of its slots, one for both devices: constexpr, so that
// device code may call it.
#pragma once

#include <cstdint>

namespace accumops {

// 1 - beta^(iterations + 1), with the power rounded to float32 as in Keras. The power is made of
// squares in float64: the same bits on all devices, and far closer than half a unit of float32.
constexpr float BiasOf(float beta, std::int64_t iterations) {
  double power = 1;
  double square = static_cast<double>(beta);
  for (std::uint64_t step = static_cast<std::uint64_t>(iterations) + 1; step != 0; step /= 2) {
    if (step % 2 == 1) power *= square;
    square *= square;
  }
  return 1 - static_cast<float>(power);
}

}  // namespace accumops
