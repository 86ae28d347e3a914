// Sums in float64 over tensors whose chunks are summed by blocks: the sum of a block, and the
// kernel that adds up the chunks of each tensor. The last block of a tensor could do that, but
// clearing its counter is a launch, too. Which thread adds what, and in which order, follows from
// the sizes.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda_common.cuh"
#include "tensor_table.cuh"

namespace accumops {
namespace cuda {

// The sum over a block's threads, in thread 0. All threads call it; between two calls they have to
// be synchronized.
template <int kThreads>
__device__ double SumOfBlock(double sum) {
  constexpr int kWarps = kThreads / kWarp;
  ACCUMOPS_SHARED(shared, double[kWarps]);
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    sum += __shfl_down_sync(kAllLanes, sum, distance);
  }
  if (thread % kWarp == 0) shared[thread / kWarp] = sum;
  __syncthreads();
  if (thread != 0) return 0;
#pragma unroll
  for (int i = 1; i < kWarps; ++i) sum += shared[i];
  return sum;
}

namespace {

constexpr int kSumThreads = 256;

// A block for each tensor.
struct TensorParams {
  static constexpr int kCapacity = 500;

  std::int64_t end[kCapacity];  // of the tensor's chunks, from `chunk_sums` on
  const double* chunk_sums;
  double* sums;
};
static_assert(sizeof(TensorParams) <= kSmallParamBytes, "too large for a kernel parameter");

__global__ void __launch_bounds__(kSumThreads)
    SumChunksKernel(ACCUMOPS_PARAMS(TensorParams) params) {
  const unsigned tensor = blockIdx.x;
  const std::int64_t begin = tensor == 0 ? 0 : params.end[tensor - 1];
  const std::int64_t end = params.end[tensor];
  double sum = 0;
#pragma unroll 4
  for (std::int64_t i = begin + threadIdx.x; i < end; i += kSumThreads) sum += params.chunk_sums[i];
  sum = SumOfBlock<kSumThreads>(sum);
  if (threadIdx.x == 0) params.sums[tensor] = sum;
}

// Adds up the chunks of each of `count` tensors, where tensor i has `chunks_of(i)` chunks, whose
// sums follow those of tensor i - 1.
template <typename CountChunks>
cudaError_t SumChunks(std::size_t count, CountChunks chunks_of, double* sums,
                      const double* chunk_sums, cudaStream_t stream) {
  TensorParams params;
  for (std::size_t first = 0; first < count; first += TensorParams::kCapacity) {
    params.chunk_sums = chunk_sums;
    params.sums = sums + first;
    std::int64_t end = 0;
    int tensors = 0;
    for (; tensors < TensorParams::kCapacity && first + tensors < count; ++tensors) {
      end += chunks_of(first + tensors);
      params.end[tensors] = end;
    }
    const cudaError_t error = Launch(SumChunksKernel, tensors, kSumThreads, params, stream);
    if (error != cudaSuccess) return error;
    chunk_sums += end;
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace cuda
}  // namespace accumops
