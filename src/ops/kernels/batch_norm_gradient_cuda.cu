// The gradient reads its arrays twice, as the forward pass does: sums of tiles, sums of channels,
// and dx, from the array's end. See batch_norm_tiling.cuh.
#include "batch_norm.h"
#include "batch_norm_tiling.cuh"

namespace accumops {
namespace {

using batch_norm::kThreads;
using batch_norm::Partials;
using batch_norm::Tile;
using batch_norm::Tiling;
using batch_norm::Walk;

struct GradientSums {
  double dy;       // the sum of dy
  double product;  // the sum of dy * (x - mean), where the mean is without its rest

  __device__ void Add(const GradientSums& other) {
    dy += other.dy;
    product += other.product;
  }
};

struct SumsParams {
  Tiling tiling;
  const void* x;
  const void* dy;
  const void* mean;
  Partials partials;
};

template <typename Traits>
__global__ void __launch_bounds__(kThreads, 3) GradientSumsKernel(ACCUMOPS_PARAMS(SumsParams) p) {
  using T = typename Traits::T;
  using Pack = typename Traits::Pack;
  using Word = typename Traits::Word;
  using Stat = typename Traits::Statistic;
  constexpr int kPack = Traits::kPack;
  constexpr int kChannels = Traits::kChannels;
  constexpr int kBatch = Traits::kNarrow ? 8 : 3;  // loads of each array in flight
  ACCUMOPS_SHARED(shared, batch_norm::TileSums<Traits, 2>);
  const Tile<Traits> tile(p.tiling, blockIdx.x);
  const auto* x = static_cast<const T*>(p.x);
  const auto* dy = static_cast<const T*>(p.dy);
  const int lanes = tile.lanes();
  Stat mean[kChannels] = {};
  Stat sum[kPack] = {};
  Stat product[kPack] = {};
  if (tile.packs() > 0) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      mean[j] = static_cast<const Stat*>(p.mean)[tile.channel(j)];
    }
  }
  Walk<Traits> walk = tile.Begin();
  for (int first = tile.lane(); first < tile.packs(); first += kBatch * lanes) {
    Word x_word[kBatch];
    Word dy_word[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k * lanes < tile.packs()) {
        x_word[k] = batch_norm::Load<Traits>(x + walk.offset());
        dy_word[k] = batch_norm::Load<Traits>(dy + walk.offset());
      }
      walk.Next();
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k * lanes >= tile.packs()) continue;
      const Pack x_pack = batch_norm::Unpack<Traits>(x_word[k]);
      const Pack dy_pack = batch_norm::Unpack<Traits>(dy_word[k]);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const Stat gradient = cuda::ToFloat(dy_pack.value[j]);
        sum[j] += gradient;
        product[j] =
            fma(gradient, cuda::ToFloat(x_pack.value[j]) - mean[Traits::ChannelOf(j)], product[j]);
      }
    }
  }

  batch_norm::FoldPack<Traits>(sum);
  batch_norm::FoldPack<Traits>(product);
#pragma unroll
  for (int j = 0; j < kChannels; ++j) {
    shared.value[0][j][threadIdx.x] = sum[j];
    shared.value[1][j][threadIdx.x] = product[j];
  }
  __syncthreads();
  const auto read = [&](unsigned thread, unsigned j) {
    return GradientSums{shared.value[0][j][thread], shared.value[1][j][thread]};
  };
  batch_norm::MergeTile<GradientSums>(
      tile, read, [&](std::int64_t channel, const GradientSums& sums) {
        const std::int64_t i = tile.split() * p.tiling.channels + channel;
        p.partials.first[i] = sums.dy;
        p.partials.second[i] = sums.product;
      });
}

struct ParametersParams {
  std::uint32_t splits;
  std::int64_t channels;
  Partials partials;
  const void* rest;
  const void* inverse;
  void* dgamma;
  void* dbeta;
};

template <typename Stat>
__global__ void __launch_bounds__(kThreads) ParametersKernel(ACCUMOPS_PARAMS(ParametersParams) p) {
  const std::int64_t channel = batch_norm::MergeChannel();
  const bool exists = channel < p.channels;
  const auto sums =
      batch_norm::MergeSplits<GradientSums>(exists ? p.splits : 0, [&](std::uint32_t split) {
        const std::int64_t i = split * p.channels + channel;
        return GradientSums{p.partials.first[i], p.partials.second[i]};
      });
  if (!exists || threadIdx.x >= batch_norm::kBlockChannels) return;
  const double rest = static_cast<const Stat*>(p.rest)[channel];
  const double inverse = static_cast<const Stat*>(p.inverse)[channel];
  static_cast<Stat*>(p.dgamma)[channel] =
      static_cast<Stat>((sums.product - rest * sums.dy) * inverse);
  static_cast<Stat*>(p.dbeta)[channel] = static_cast<Stat>(sums.dy);
}

struct InputParams {
  Tiling tiling;
  const void* x;
  const void* dy;
  void* dx;
  const bool* mask;
  const void* gamma;
  const void* mean;
  const void* rest;
  const void* inverse;
  const void* dgamma;
  const void* dbeta;
  const std::int64_t* count;  // null where the statistics do not depend on x
};

// dx = scale * dy + slope * (x - shift) + offset
template <typename Stat>
struct Factors {
  Stat scale;
  Stat shift;
  Stat slope;
  Stat offset;

  static __device__ Factors Of(const InputParams& p, std::int64_t channel) {
    const auto at = [channel](const void* values) {
      return static_cast<double>(static_cast<const Stat*>(values)[channel]);
    };
    const double inverse = at(p.inverse);
    const double scale = at(p.gamma) * inverse;
    if (p.count == nullptr || *p.count == 0) return {static_cast<Stat>(scale), 0, 0, 0};
    const double share = scale / static_cast<double>(*p.count);
    const double slope = -share * inverse * at(p.dgamma);
    return {static_cast<Stat>(scale), static_cast<Stat>(at(p.mean)), static_cast<Stat>(slope),
            static_cast<Stat>(-share * at(p.dbeta) - slope * at(p.rest))};
  }
};

template <typename Traits>
__global__ void __launch_bounds__(kThreads, 3) InputGradientKernel(ACCUMOPS_PARAMS(InputParams) p) {
  using T = typename Traits::T;
  using Pack = typename Traits::Pack;
  using Word = typename Traits::Word;
  using Stat = typename Traits::Statistic;
  constexpr int kPack = Traits::kPack;
  constexpr int kChannels = Traits::kChannels;
  constexpr int kBatch = Traits::kNarrow ? 8 : 3;  // loads of each array in flight
  ACCUMOPS_SHARED(shared, Factors<Stat>[batch_norm::kMaxSlots]);
  const Tile<Traits> tile(p.tiling, gridDim.x - 1 - blockIdx.x);
  const auto* x = static_cast<const T*>(p.x);
  const auto* dy = static_cast<const T*>(p.dy);
  auto* dx = static_cast<T*>(p.dx);
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
    Word x_word[kBatch];
    Word dy_word[kBatch];
    unsigned taken = 0;  // a bit for each pack that the statistics were made of
    Walk<Traits> ahead = walk;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k * lanes < tile.packs()) {
        dy_word[k] = batch_norm::LoadLast<Traits>(dy + ahead.offset());
        if (p.count != nullptr) {
          x_word[k] = batch_norm::LoadLast<Traits>(x + ahead.offset());
          taken |= 1u << k;
        }
      }
      ahead.Next();
    }
    if (p.mask != nullptr) {
      const bool* mask = p.mask + tile.first_pack() + first;
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if ((taken >> k & 1) && !mask[k * lanes]) taken &= ~(1u << k);
      }
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k * lanes < tile.packs()) {
        const Pack x_pack = batch_norm::Unpack<Traits>(x_word[k]);
        Pack pack = batch_norm::Unpack<Traits>(dy_word[k]);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          const auto& [scale, shift, slope, offset] = factors[Traits::ChannelOf(j)];
          T& value = pack.value[j];
          const Stat distance = cuda::ToFloat(x_pack.value[j]) - shift;
          const Stat rest = taken >> k & 1 ? fma(slope, distance, offset) : Stat{0};
          batch_norm::Round(fma(scale, cuda::ToFloat(value), rest), value);
        }
        batch_norm::Store<Traits>(dx + walk.offset(), pack);
      }
      walk.Next();
    }
  }
}

template <typename Traits>
struct GradientKernels {
  static cudaError_t Run(const Tiling& tiling, const BatchNormGradient& args, void* workspace,
                         cudaStream_t stream) {
    const BatchNormStatistics& statistics = args.statistics;
    const Partials partials = Partials::In(workspace, tiling);
    if (args.dgamma != nullptr) {
      if (tiling.tiles() > 0) {
        const SumsParams params = {tiling, args.x, args.dy, statistics.mean, partials};
        const cudaError_t error =
            cuda::Launch(GradientSumsKernel<Traits>, tiling.tiles(), kThreads, params, stream);
        if (error != cudaSuccess) return error;
      }
      const ParametersParams params = {tiling.splits,   tiling.channels,    partials,
                                       statistics.rest, statistics.inverse, args.dgamma,
                                       args.dbeta};
      const cudaError_t error =
          cuda::Launch(ParametersKernel<typename Traits::Statistic>,
                       batch_norm::MergeBlocks(tiling), kThreads, params, stream);
      if (error != cudaSuccess) return error;
    }
    if (tiling.tiles() == 0) return cudaSuccess;
    const InputParams params = {tiling,          args.x,          args.dy,
                                args.dx,         args.mask,       args.gamma,
                                statistics.mean, statistics.rest, statistics.inverse,
                                args.dgamma,     args.dbeta,      args.count};
    return cuda::Launch(InputGradientKernel<Traits>, tiling.tiles(), kThreads, params, stream);
  }
};

}  // namespace

const char* BatchNormGradientCuda(const BatchNormGradient& args, void* workspace,
                                  CUstream_st* stream) {
  if (args.shape.channels == 0) return nullptr;
  return batch_norm::Run<GradientKernels>(args.shape, args.dtype, {args.x, args.dy, args.dx}, args,
                                          workspace, stream);
}

}  // namespace accumops
