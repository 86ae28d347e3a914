// One block, as the window's counters are read for every channel before they are written.
#include "cuda_common.cuh"
#include "moments_channel.h"

namespace accumops {
namespace {

constexpr int kThreads = 1024;

template <typename Batch, typename Moving>
__global__ void __launch_bounds__(kThreads) MergeMomentsKernel(ACCUMOPS_PARAMS(MomentsMerge) args) {
  const MergePlan plan(args);
  for (std::int64_t c = threadIdx.x; c < args.channels; c += kThreads) {
    MergeChannel<Batch, Moving>(args, plan, c);
  }
  __syncthreads();
  if (threadIdx.x == 0) plan.Count(args);
}

}  // namespace

const char* MergeMomentsCuda(const MomentsMerge& args, CUstream_st* stream) {
  return cuda::ErrorText(WithTypesOf(args, [&](auto* batch, auto* moving) {
    using Batch = std::remove_pointer_t<decltype(batch)>;
    using Moving = std::remove_pointer_t<decltype(moving)>;
    return cuda::Launch(MergeMomentsKernel<Batch, Moving>, 1, kThreads, args, stream);
  }));
}

}  // namespace accumops
