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

template <typename Batch, typename Moving>
__global__ void __launch_bounds__(kThreads) MergeMomentsKernel(ACCUMOPS_PARAMS(MomentsMerge) args) {
  Merge<Batch, Moving>(args);
}

struct EndParams {
  static constexpr int kCapacity = 48;

  EndedWindow windows[kCapacity];
  const bool* applies;
};
static_assert(sizeof(EndParams) <= cuda::kSmallParamBytes, "too large for a kernel parameter");

__global__ void __launch_bounds__(kThreads) EndWindowsKernel(ACCUMOPS_PARAMS(EndParams) args) {
  if (args.applies != nullptr && !*args.applies) return;
  const MomentsMerge merge = MergeOf(args.windows[blockIdx.x]);
  if (merge.moving.dtype == DType::kFloat64) {
    Merge<float, double>(merge);
  } else {
    Merge<float, float>(merge);
  }
}

}  // namespace

const char* MergeMomentsCuda(const MomentsMerge& args, CUstream_st* stream) {
  return cuda::ErrorText(WithTypesOf(args, [&](auto* batch, auto* moving) {
    using Batch = std::remove_pointer_t<decltype(batch)>;
    using Moving = std::remove_pointer_t<decltype(moving)>;
    return cuda::Launch(MergeMomentsKernel<Batch, Moving>, 1, kThreads, args, stream);
  }));
}

const char* EndWindowsCuda(const WindowsEnd& args, CUstream_st* stream) {
  EndParams params = {};
  params.applies = args.applies;
  return cuda::ErrorText(cuda::ForEachTable(
      args.count, EndParams::kCapacity, [](std::size_t) { return std::int64_t{1}; },
      [&](std::size_t i, const cuda::TablePart& part) {
        params.windows[part.entry] = args.windows[i];
      },
      [&](int entries, std::int64_t) {
        return cuda::Launch(EndWindowsKernel, entries, kThreads, params, stream);
      }));
}

}  // namespace accumops
