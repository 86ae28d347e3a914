// Training's forward pass is three kernels: moments of tiles, statistics of channels, and a second
// reading that normalizes. The last kernel starts with the array's end, which the first has just
// left in the L2 cache, and marks what it reads and writes as the first to evict. See
// batch_norm_tiling.cuh.
#include "batch_norm.h"
#include "batch_norm_tiling.cuh"

namespace accumops {
namespace {

using batch_norm::kThreads;
using batch_norm::Partials;
using batch_norm::Tile;
using batch_norm::Tiling;
using batch_norm::Walk;

// The moments of `count` values, as sums about a shift.
struct Moments {
  double count;
  double shift;
  double sum;      // of the values' distances from the shift
  double squares;  // the sum of these distances' squares

  static __device__ Moments Of(double count, double mean, double centred) {
    return {count, mean, 0, centred};
  }

  __device__ double mean() const { return count == 0 ? 0 : shift + sum / count; }
  __device__ double centred() const {
    if (count == 0) return 0;
    const double result = squares - sum * sum / count;
    return result < 0 ? 0 : result;
  }

  // Chan's formula without its division, which waits until all moments are merged.
  __device__ void Add(const Moments& other) {
    if (other.count == 0) return;
    if (count == 0) shift = other.shift;
    const double distance = other.shift - shift;
    count += other.count;
    sum += other.sum + other.count * distance;
    squares += other.squares + distance * (2 * other.sum + other.count * distance);
  }
};

struct MomentsParams {
  Tiling tiling;
  const void* x;
  const bool* mask;
  Partials partials;
};

template <typename Traits>
__global__ void __launch_bounds__(kThreads, 4) MomentsKernel(ACCUMOPS_PARAMS(MomentsParams) p) {
  using T = typename Traits::T;
  using Pack = typename Traits::Pack;
  using Word = typename Traits::Word;
  using Stat = typename Traits::Statistic;
  constexpr int kPack = Traits::kPack;
  constexpr int kChannels = Traits::kChannels;
  constexpr int kBatch = Traits::kNarrow ? 12 : 4;  // loads in flight
  ACCUMOPS_SHARED(shared, batch_norm::TileSums<Traits, 3>);
  ACCUMOPS_SHARED(shared_count, int[kThreads]);
  const Tile<Traits> tile(p.tiling, blockIdx.x);
  const auto* x = static_cast<const T*>(p.x);
  const int lanes = tile.lanes();
  Stat shift[kChannels] = {};
  Stat sum[kPack] = {};
  Stat squares[kPack] = {};
  int count = 0;
  Walk<Traits> walk = tile.Begin();
  for (int first = tile.lane(); first < tile.packs(); first += kBatch * lanes) {
    Word word[kBatch];
    unsigned taken = 0;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k * lanes < tile.packs()) {
        word[k] = batch_norm::Load<Traits>(x + walk.offset());
        taken |= 1u << k;
      }
      walk.Next();
    }
    if (p.mask != nullptr) {
      const bool* mask = p.mask + tile.first_pack() + first;
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if ((taken >> k & 1) && !mask[k * lanes]) taken &= ~(1u << k);
      }
    }
    const auto add = [&](auto function) {
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (!(taken >> k & 1)) continue;
        const Pack pack = batch_norm::Unpack<Traits>(word[k]);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          function(j, cuda::ToFloat(pack.value[j]) - shift[Traits::ChannelOf(j)]);
        }
      }
    };
    if (count == 0 && taken != 0) {
      Word origin = word[0];
#pragma unroll
      for (int k = kBatch - 1; k >= 0; --k) {
        if (taken >> k & 1) origin = word[k];
      }
      const Pack pack = batch_norm::Unpack<Traits>(origin);
#pragma unroll
      for (int j = 0; j < kChannels; ++j) shift[j] = cuda::ToFloat(pack.value[j]);
      // Moves the shift to the batch's mean, in case the batch's first value is an outlier.
      add([&](int j, Stat distance) { sum[j] += distance; });
      batch_norm::FoldPack<Traits>(sum);
      const Stat share = Stat{1} / static_cast<Stat>(__popc(taken) * (kPack / kChannels));
#pragma unroll
      for (int j = 0; j < kChannels; ++j) shift[j] += sum[j] * share;
#pragma unroll
      for (Stat& s : sum) s = 0;
    }
    count += __popc(taken);
    add([&](int j, Stat distance) {
      sum[j] += distance;
      squares[j] = fma(distance, distance, squares[j]);
    });
  }

  batch_norm::FoldPack<Traits>(sum);
  batch_norm::FoldPack<Traits>(squares);
#pragma unroll
  for (int j = 0; j < kChannels; ++j) {
    shared.value[0][j][threadIdx.x] = shift[j];
    shared.value[1][j][threadIdx.x] = sum[j];
    shared.value[2][j][threadIdx.x] = squares[j];
  }
  shared_count[threadIdx.x] = count * (kPack / kChannels);
  __syncthreads();
  const auto read = [&](unsigned thread, unsigned j) {
    return Moments{static_cast<double>(shared_count[thread]), shared.value[0][j][thread],
                   shared.value[1][j][thread], shared.value[2][j][thread]};
  };
  batch_norm::MergeTile<Moments>(tile, read, [&](std::int64_t channel, const Moments& moments) {
    const std::int64_t i = tile.split() * p.tiling.channels + channel;
    p.partials.first[i] = moments.mean();
    p.partials.second[i] = moments.centred();
    if (channel == 0) p.partials.count[tile.split()] = static_cast<std::int64_t>(moments.count);
  });
}

struct StatisticsParams {
  std::uint32_t splits;
  std::int64_t channels;
  Partials partials;
  double epsilon;
  BatchNormStatistics statistics;
  std::int64_t* count;
};

template <typename Stat>
__global__ void __launch_bounds__(kThreads) StatisticsKernel(ACCUMOPS_PARAMS(StatisticsParams) p) {
  const std::int64_t channel = batch_norm::MergeChannel();
  const bool exists = channel < p.channels;
  const auto moments =
      batch_norm::MergeSplits<Moments>(exists ? p.splits : 0, [&](std::uint32_t split) {
        const std::int64_t i = split * p.channels + channel;
        return Moments::Of(static_cast<double>(p.partials.count[split]), p.partials.first[i],
                           p.partials.second[i]);
      });
  if (!exists || threadIdx.x >= batch_norm::kBlockChannels) return;
  const double exact_mean = moments.mean();
  const double variance = moments.count == 0 ? 0 : moments.centred() / moments.count;
  const Stat mean = static_cast<Stat>(exact_mean);
  static_cast<Stat*>(p.statistics.mean)[channel] = mean;
  static_cast<Stat*>(p.statistics.rest)[channel] = static_cast<Stat>(exact_mean - mean);
  static_cast<Stat*>(p.statistics.variance)[channel] = static_cast<Stat>(variance);
  static_cast<Stat*>(p.statistics.inverse)[channel] =
      static_cast<Stat>(1 / sqrt(variance + p.epsilon));
  if (channel == 0) *p.count = static_cast<std::int64_t>(moments.count);
}

struct NormalizeParams {
  Tiling tiling;
  const void* x;
  void* y;
  const void* gamma;
  const void* beta;
  const void* mean;
  const void* rest;      // null for zeros
  const void* inverse;   // null where the kernel makes it from variance and epsilon
  const void* variance;  // read where inverse is null
  double epsilon;        // read where inverse is null
};

// y = (x - shift) * scale + offset
template <typename Stat>
struct Factors {
  Stat shift;
  Stat scale;
  Stat offset;

  static __device__ Factors Of(const NormalizeParams& p, std::int64_t channel) {
    const auto at = [channel](const void* values) {
      return static_cast<const Stat*>(values)[channel];
    };
    const double inverse = p.inverse != nullptr
                               ? at(p.inverse)
                               : 1 / sqrt(static_cast<double>(at(p.variance)) + p.epsilon);
    const double rest = p.rest != nullptr ? at(p.rest) : 0;
    const double scale = at(p.gamma) * inverse;
    return {at(p.mean), static_cast<Stat>(scale), static_cast<Stat>(at(p.beta) - rest * scale)};
  }
};

template <typename Traits>
__global__ void __launch_bounds__(kThreads, 4) NormalizeKernel(ACCUMOPS_PARAMS(NormalizeParams) p) {
  using T = typename Traits::T;
  using Pack = typename Traits::Pack;
  using Word = typename Traits::Word;
  using Stat = typename Traits::Statistic;
  constexpr int kPack = Traits::kPack;
  constexpr int kChannels = Traits::kChannels;
  constexpr int kBatch = Traits::kNarrow ? 8 : 4;  // loads in flight
  ACCUMOPS_SHARED(shared, Factors<Stat>[batch_norm::kMaxSlots]);
  const Tile<Traits> tile(p.tiling, gridDim.x - 1 - blockIdx.x);
  const auto* x = static_cast<const T*>(p.x);
  auto* y = static_cast<T*>(p.y);
  const int lanes = tile.lanes();
  batch_norm::ForEachSlot(tile, [&](unsigned slot, std::int64_t channel) {
    shared[slot] = Factors<Stat>::Of(p, channel);
  });
  __syncthreads();
  if (tile.packs() == 0) return;
  Factors<Stat> factors[kChannels];
#pragma unroll
  for (int j = 0; j < kChannels; ++j) factors[j] = shared[tile.slot(j)];
  Walk<Traits> walk = tile.Begin();
  for (int first = tile.lane(); first < tile.packs(); first += kBatch * lanes) {
    Word word[kBatch];
    Walk<Traits> ahead = walk;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k * lanes < tile.packs()) {
        word[k] = batch_norm::LoadLast<Traits>(x + ahead.offset());
      }
      ahead.Next();
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k * lanes < tile.packs()) {
        Pack pack = batch_norm::Unpack<Traits>(word[k]);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          const auto& [shift, scale, offset] = factors[Traits::ChannelOf(j)];
          T& value = pack.value[j];
          batch_norm::Round(fma(cuda::ToFloat(value) - shift, scale, offset), value);
        }
        batch_norm::Store<Traits>(y + walk.offset(), pack);
      }
      walk.Next();
    }
  }
}

template <typename Traits>
struct ForwardKernels {
  static cudaError_t Run(const Tiling& tiling, const BatchNormForward& args, void* workspace,
                         cudaStream_t stream) {
    const BatchNormStatistics& statistics = args.statistics;
    const Partials partials = Partials::In(workspace, tiling);
    cudaError_t error = cudaSuccess;
    if (tiling.tiles() > 0) {
      const MomentsParams params = {tiling, args.x, args.mask, partials};
      error = cuda::Launch(MomentsKernel<Traits>, tiling.tiles(), kThreads, params, stream);
      if (error != cudaSuccess) return error;
    }
    const StatisticsParams params = {tiling.splits, tiling.channels, partials,
                                     args.epsilon,  statistics,      args.count};
    error = cuda::Launch(StatisticsKernel<typename Traits::Statistic>,
                         batch_norm::MergeBlocks(tiling), kThreads, params, stream);
    if (error != cudaSuccess || tiling.tiles() == 0) return error;
    const NormalizeParams normalize = {
        tiling,    args.x,          args.y,          args.gamma,
        args.beta, statistics.mean, statistics.rest, statistics.inverse,
        nullptr,   args.epsilon};
    return cuda::Launch(NormalizeKernel<Traits>, tiling.tiles(), kThreads, normalize, stream);
  }
};

template <typename Traits>
struct InferenceKernels {
  static cudaError_t Run(const Tiling& tiling, const BatchNormInference& args,
                         cudaStream_t stream) {
    if (tiling.tiles() == 0) return cudaSuccess;
    const NormalizeParams params = {tiling,    args.x,  args.y,  args.gamma,    args.beta,
                                    args.mean, nullptr, nullptr, args.variance, args.epsilon};
    return cuda::Launch(NormalizeKernel<Traits>, tiling.tiles(), kThreads, params, stream);
  }
};

struct CountParams {
  const bool* mask;
  std::int64_t rows;
  std::int64_t inner;
  std::int64_t* count;
};

// For an array without channels, of which nothing else is computed; one thread is enough.
__global__ void CountKernel(ACCUMOPS_PARAMS(CountParams) p) {
  std::int64_t rows = p.mask == nullptr ? p.rows : 0;
  for (std::int64_t r = 0; p.mask != nullptr && r < p.rows; ++r) rows += p.mask[r];
  *p.count = rows * p.inner;
}

}  // namespace

std::int64_t BatchNormWorkspaceCuda(const BatchNormShape& shape, DType dtype) {
  // The pack depends on the pointers, too, so this is the most that any pack needs.
  std::int64_t bytes = 0;
  for (int pack = 1; pack * SizeOf(dtype) <= cuda::kVectorBytes; pack *= 2) {
    const std::int64_t needed = Partials::Bytes(batch_norm::MakeTiling(shape, dtype, pack));
    if (needed > bytes) bytes = needed;
  }
  return bytes;
}

const char* BatchNormForwardCuda(const BatchNormForward& args, void* workspace,
                                 CUstream_st* stream) {
  if (args.shape.channels == 0) {
    const CountParams params = {args.mask, args.shape.outer, args.shape.inner, args.count};
    return cuda::ErrorText(cuda::Launch(CountKernel, 1, 1, params, stream));
  }
  return batch_norm::Run<ForwardKernels>(args.shape, args.dtype, {args.x, args.y}, args, workspace,
                                         stream);
}

const char* BatchNormInferenceCuda(const BatchNormInference& args, CUstream_st* stream) {
  return batch_norm::Run<InferenceKernels>(args.shape, args.dtype, {args.x, args.y}, args, stream);
}

}  // namespace accumops
