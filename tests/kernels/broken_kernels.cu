// Kernels that are broken on purpose, to see that the emulated GPU and the sanitizers notice. Each
// sums 64 numbers in shared memory; `kSound` does so correctly.
#include <cstdint>
#include <memory>
#include <vector>

#include "cuda_dialect.cuh"

namespace {

enum Defect {
  kSound,
  kNoBarrier,
  kDivergentBarrier,
  kMaskWithoutCaller,
  kMaskWithEndedLane,
  kDifferentOperations,
  kSharedIndexTooLarge,
  kGlobalIndexTooLarge,
  kGlobalIndexNegative,
  kSharedMemoryNotInitialized,
  kBlocksWriteTheSame,
  kMisaligned,
  kMemoryGone,
  kHostMemoryGone,
  kStreamsNotOrdered
};

constexpr unsigned kThreads = 64;

struct Params {
  const float* values;
  float* sums;  // one for each block
  const float* factor;
  Defect defect;
};

__global__ void SumKernel(ACCUMOPS_PARAMS(Params) p) {
  ACCUMOPS_SHARED(shared, float[kThreads]);
  const unsigned i = threadIdx.x;
  float* const shared_value = shared;
  const unsigned beyond = p.defect == kSharedIndexTooLarge && i + 1 == kThreads ? 1 : 0;
  if (p.defect == kMisaligned) {
    const auto* word = reinterpret_cast<const uint4*>(p.values + 1);
    shared[i] = static_cast<float>(word->x);
  }
  if (p.defect != kSharedMemoryNotInitialized || i != 0) shared_value[i + beyond] = p.values[i];
  if (p.defect == kDivergentBarrier && i == 3) return;
  if (p.defect != kNoBarrier) __syncthreads();
  if (p.defect == kMaskWithoutCaller) __ballot_sync(1u, true);
  if (p.defect == kMaskWithEndedLane) {
    if (i == 5) return;
    __ballot_sync(0xffffffffu, true);
  }
  if (p.defect == kDifferentOperations) {
    if (i % 2 == 0) {
      __ballot_sync(0xffffffffu, true);
    } else {
      __shfl_sync(0xffffffffu, 1, 0);
    }
  }
  if (i != 0) return;
  float sum = 0;
  for (unsigned k = 0; k < kThreads; ++k) sum += shared[k];
  std::int64_t at = p.defect == kBlocksWriteTheSame ? 0 : blockIdx.x;
  if (p.defect == kGlobalIndexTooLarge) ++at;
  if (p.defect == kGlobalIndexNegative) --at;
  p.sums[at] = sum * (p.factor == nullptr ? 1.0f : *p.factor);
}

}  // namespace

// Runs the kernel on numbers that add up to 64. Returns the sum that the last block finds.
extern "C" __attribute__((visibility("default"))) float run_broken_kernel(int defect) {
  constexpr unsigned kBlocks = 3;
  auto* const values = static_cast<float*>(emulated_cuda_allocate((kThreads + 4) * sizeof(float)));
  auto* const sums = static_cast<float*>(emulated_cuda_allocate(kBlocks * sizeof(float)));
  for (unsigned i = 0; i < kThreads + 4; ++i) values[i] = 1;
  cudaStream_t streams[] = {nullptr, reinterpret_cast<cudaStream_t>(0x100)};
  Params params = {values, sums, nullptr, static_cast<Defect>(defect)};
  auto host_factor = std::make_unique<float>(1.0f);
  void* factor = nullptr;
  if (defect == kHostMemoryGone) params.factor = host_factor.get();
  if (defect == kMemoryGone || defect == kStreamsNotOrdered) {
    cudaMallocAsync(&factor, sizeof(float), nullptr);
    params.factor = static_cast<const float*>(factor);
    cudaMemcpyAsync(factor, host_factor.get(), sizeof(float), cudaMemcpyHostToDevice, nullptr);
  }
  if (defect == kMemoryGone) cudaFreeAsync(factor, nullptr);
  accumops::cuda::Launch(SumKernel, kBlocks, kThreads, params,
                         streams[defect == kStreamsNotOrdered ? 1 : 0]);
  if (defect == kStreamsNotOrdered) cudaFreeAsync(factor, nullptr);
  host_factor.reset();
  emulated_cuda_synchronize();
  const float result = sums[kBlocks - 1];
  emulated_cuda_free(values);
  emulated_cuda_free(sums);
  return result;
}
