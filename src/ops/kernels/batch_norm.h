// Batch normalization over an array of shape (outer, channels, inner), contiguous: channels last is
// inner = 1, channels first (N, C, H, W) is (N, C, H * W).
//
//   training    y = (x - mean) * inverse * gamma + beta,  inverse = 1 / sqrt(variance + epsilon)
//               with the mean and the biased variance of the channel's values. A mask has a flag
//               for each of `outer` rows and needs inner = 1: rows whose flag is false do not count
//   inference   the same with a mean and a variance that are given
//   gradient    for training, with n values a channel, sums over the channel's values, and
//               x^ = (x - mean) * inverse: dbeta = sum(dy), dgamma = sum(dy * x^),
//               dx = gamma * inverse * (dy - mask * (dbeta + x^ * dgamma) / n)
//               for inference: dx = gamma * inverse * dy
//
// Moments are centred sums of chunks of rows, merged by Chan's formula in double, in a fixed order:
// nothing cancels where a mean is large beside its deviation, and any number of threads gives the
// same bits. Statistics and parameters are float32, or float64 for float64 data. A mean is a pair
// of floats, `mean` and the `rest` that rounding left, so that centring is as exact as the data.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "parallel_for.h"

struct CUstream_st;

namespace accumops {

struct BatchNormShape {
  std::int64_t outer;
  std::int64_t channels;
  std::int64_t inner;
};

// Arrays of `channels` values in the statistics' type.
struct BatchNormStatistics {
  void* mean;
  void* rest;      // the mean is mean + rest
  void* variance;  // biased
  void* inverse;   // 1 / sqrt(variance + epsilon)
};

struct BatchNormForward {
  BatchNormShape shape;
  DType dtype;  // of x and y
  const void* x;
  void* y;
  const bool* mask;  // `outer` flags, or null
  const void* gamma;
  const void* beta;
  double epsilon;
  BatchNormStatistics statistics;  // written by training
  std::int64_t* count;             // written by training: values a channel, without masked ones
};

struct BatchNormInference {
  BatchNormShape shape;
  DType dtype;  // of x and y
  const void* x;
  void* y;
  const void* gamma;
  const void* beta;
  const void* mean;
  const void* variance;
  double epsilon;
};

struct BatchNormGradient {
  BatchNormShape shape;
  DType dtype;  // of x, dy and dx
  const void* x;
  const void* dy;
  void* dx;
  const bool* mask;  // `outer` flags, or null
  const void* gamma;
  BatchNormStatistics statistics;  // its variance is not read
  const std::int64_t* count;       // null for the gradient of inference
  void* dgamma;
  void* dbeta;
};

constexpr DType StatisticsType(DType data) {
  return data == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

void BatchNormForwardCpu(const BatchNormForward& args, Executor& executor);
void BatchNormInferenceCpu(const BatchNormInference& args, Executor& executor);
void BatchNormGradientCpu(const BatchNormGradient& args, Executor& executor);

// Bytes of device memory that the forward pass and the gradient need to work in. The memory need
// not be cleared, and must be aligned as cudaMalloc aligns.
std::int64_t BatchNormWorkspaceCuda(const BatchNormShape& shape, DType dtype);
// All pointers are device memory. They return null, or the text of the CUDA error.
const char* BatchNormForwardCuda(const BatchNormForward& args, void* workspace,
                                 CUstream_st* stream);
const char* BatchNormInferenceCuda(const BatchNormInference& args, CUstream_st* stream);
const char* BatchNormGradientCuda(const BatchNormGradient& args, void* workspace,
                                  CUstream_st* stream);

}  // namespace accumops
