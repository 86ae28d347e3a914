// One block for a window, whose counters are read for every channel before they are written.
#include "cuda_common.cuh"
#include "moments_channel.h"
#include "tensor_table.cuh"

namespace accumops {
namespace {

constexpr int kThreads = 1024;

// Whether all of a batch's moments are finite, found by all threads of a block.
template <typename Batch>
__device__ bool AllFinite(const MomentsMerge& args) {
  ACCUMOPS_SHARED(finite, bool);
  if (threadIdx.x == 0) finite = true;
  __syncthreads();
  for (std::int64_t c = threadIdx.x; c < args.channels; c += kThreads) {
    if (!IsFinite<Batch>(args, c)) cuda::SetFromAnyThread(&finite, false);
  }
  __syncthreads();
  return finite;
}

// Merges with all threads of a block.
template <typename Batch, typename Moving>
__device__ void Merge(const MomentsMerge& args) {
  const MergePlan plan(args, !args.only_finite || AllFinite<Batch>(args));
  for (std::int64_t c = threadIdx.x; c < args.channels; c += kThreads) {
    MergeChannel<Batch, Moving>(args, plan, c);
  }
  __syncthreads();
  if (threadIdx.x == 0) plan.Count(args);
}

struct MergeParams {
  static constexpr int kCapacity = 36;

  MomentsMerge merges[kCapacity];
  const bool* applies;
};
static_assert(sizeof(MergeParams) <= cuda::kSmallParamBytes, "too large for a kernel parameter");

__global__ void __launch_bounds__(kThreads) MergeMomentsKernel(ACCUMOPS_PARAMS(MergeParams) args) {
  if (args.applies != nullptr && !*args.applies) return;
  const MomentsMerge& merge = args.merges[blockIdx.x];
  const bool wide_moving = merge.moving.dtype == DType::kFloat64;
  if (merge.batch.dtype == DType::kFloat64) {
    wide_moving ? Merge<double, double>(merge) : Merge<double, float>(merge);
  } else {
    wide_moving ? Merge<float, double>(merge) : Merge<float, float>(merge);
  }
}

}  // namespace

const char* MergeMomentsCuda(const MomentsMerges& args, CUstream_st* stream) {
  MergeParams params = {};
  params.applies = args.applies;
  return cuda::ErrorText(cuda::ForEachTable(
      args.count, MergeParams::kCapacity, [](std::size_t) { return std::int64_t{1}; },
      [&](std::size_t i, const cuda::TablePart& part) {
        params.merges[part.entry] = args.merges[i];
      },
      [&](int entries, std::int64_t) {
        return cuda::Launch(MergeMomentsKernel, entries, kThreads, params, stream);
      }));
}

}  // namespace accumops
