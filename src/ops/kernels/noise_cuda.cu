// One block adds up what a micro-batch reports of all variables, and one thread ends a window: a
// few hundred values and a few scalars, in one launch each.
#include "chunk_sums.cuh"
#include "cuda_common.cuh"
#include "noise.h"

namespace accumops {
namespace {

constexpr int kThreads = 128;

struct GroupParams {
  const double* norms;
  std::int64_t count;
  DeviceScalar share;
  const bool* starts;
  double* window;
};

__global__ void __launch_bounds__(kThreads) AddGroupKernel(ACCUMOPS_PARAMS(GroupParams) params) {
  double gradients = 0, sums = 0;
  for (std::int64_t i = threadIdx.x; i < params.count; i += kThreads) {
    gradients += params.norms[i];
    sums += params.norms[params.count + i];
  }
  gradients = cuda::SumOfBlock<kThreads>(gradients);
  __syncthreads();
  sums = cuda::SumOfBlock<kThreads>(sums);
  if (threadIdx.x != 0) return;
  noise::AddGroup({gradients, sums, cuda::ReadScale(params.share), *params.starts}, params.window);
}

struct EndParams {
  const double* window;
  NoiseEnding ending;
  DeviceScalar shares;
  const double* scale;
  const bool* applies;
  NoiseStatistics statistics;
};

__global__ void EndWindowKernel(ACCUMOPS_PARAMS(EndParams) params) {
  NoiseEnding ending = params.ending;
  ending.shares = cuda::ReadScale(params.shares);
  ending.scale = *params.scale;
  ending.applies = *params.applies;
  *params.statistics.norm = sqrt(noise::EndWindow(params.window, ending, params.statistics));
}

}  // namespace

const char* AddNoiseGroupCuda(const double* norms, std::size_t count, DeviceScalar share,
                              const bool* starts, double* window, CUstream_st* stream) {
  const GroupParams params = {norms, static_cast<std::int64_t>(count), share, starts, window};
  return cuda::ErrorText(cuda::Launch(AddGroupKernel, 1, kThreads, params, stream));
}

const char* EndNoiseWindowCuda(const double* window, const NoiseEnding& ending, DeviceScalar shares,
                               const double* scale, const bool* applies,
                               const NoiseStatistics& statistics, CUstream_st* stream) {
  const EndParams params = {window, ending, shares, scale, applies, statistics};
  return cuda::ErrorText(cuda::Launch(EndWindowKernel, 1, 1, params, stream));
}

}  // namespace accumops
