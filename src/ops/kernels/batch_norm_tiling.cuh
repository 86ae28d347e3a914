// How the batch normalization kernels share an array among blocks and sum over its channels. Why it
// is built this way:
//
// - A column is a pack of adjacent channels where channels are last; where they are first it is one
//   channel, and its packs hold adjacent values. A tile is a few columns by as many packs of each
//   as 256 threads take in 24 steps: little enough to sum in float, and so many tiles that the
//   hardware's scheduler balances them. Tiles depend on the array alone, so the bits do as well.
// - A tile leaves two doubles a channel, 1 or 2% of what it read, and a kernel of its own adds them
//   up. The last block to finish could do that, but one block reads them more slowly than many do,
//   and clearing its counter is a launch, too.
// - A thread takes its moments about the mean of its first values, so only values that one thread
//   sums can cancel. All that follows is double.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "batch_norm.h"
#include "cuda_common.cuh"

namespace accumops {
namespace batch_norm {

using cuda::kAllLanes;
using cuda::kWarp;

constexpr int kThreads = 256;

template <typename Pack, int kSize>
struct WordOf {
  using Type = cuda::WordOf<Pack>;
};
template <typename T>
struct WordOf<cuda::Pack<T, 1>, 1> {
  using Type = T;
};

// What a kernel is compiled for.
template <typename Element, int kSize, bool kFirst>
struct Traits {
  using T = Element;
  using Pack = cuda::Pack<T, kSize>;
  // What waits to be used stays packed: 16-bit values would take a register each.
  using Word = typename WordOf<Pack, kSize>::Type;
  // The type of the statistics, and of a thread's sums.
  using Statistic = std::conditional_t<std::is_same_v<T, double>, double, float>;

  static constexpr int kPack = kSize;
  static constexpr bool kChannelsFirst = kFirst;
  static constexpr int kChannels = kFirst ? 1 : kSize;  // of a column

  // Which of the column's channels a pack's value belongs to.
  static constexpr __host__ __device__ int ChannelOf(int j) { return kFirst ? 0 : j; }

  // Whether it takes more loads at once to keep the memory busy.
  static constexpr bool kNarrow = sizeof(Pack) < 8;
};

// Packs that a thread takes of a tile. Single values make small tiles, so there it takes more.
constexpr int Steps(int pack) { return pack == 1 ? 64 : 24; }

// Columns of a tile where channels are last: enough to fill cache lines, few enough that many
// threads share a column and the tile's sums are few.
constexpr int MaxWidth(int pack, int element_bytes) {
  return pack == 1 ? 64 : 256 / (pack * element_bytes);
}

constexpr int kMaxSlots = 128;  // channels of a tile

struct Tiling {
  bool channels_first;
  unsigned column_channels;
  unsigned width;        // columns of a tile
  unsigned lanes;        // threads that share a column
  unsigned mergers;      // threads that add up the lanes of a channel: a power of two
  int tile_packs;        // of each column of a tile
  std::uint32_t slices;  // tiles side by side
  std::uint32_t splits;  // tiles that share a channel
  std::int64_t channels;
  std::int64_t inner;
  std::int64_t packs;       // of a column
  std::int64_t run_packs;   // packs of a column that follow one another in memory
  std::int64_t run_stride;  // elements from one such run to the next
  int step_packs;           // packs within the run from a lane's pack to its next
  std::int64_t step;        // elements from a lane's pack to its next, if no run ends between them

  std::int64_t tiles() const { return std::int64_t{slices} * splits; }
};

inline std::int64_t CeilDivide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline Tiling MakeTiling(const BatchNormShape& shape, DType dtype, int pack) {
  Tiling t = {};
  t.channels_first = shape.inner != 1;
  t.column_channels = t.channels_first ? 1u : static_cast<unsigned>(pack);
  t.channels = shape.channels;
  t.inner = shape.inner;
  t.run_packs = t.channels_first ? shape.inner / pack : 1;
  t.packs = shape.outer * t.run_packs;
  const std::int64_t columns = shape.channels / t.column_channels;
  if (t.packs == 0 || columns == 0) return t;
  if (t.channels_first) {
    constexpr int kFewSteps = 8;
    t.lanes = kThreads;
    while (t.lanes > kWarp && t.lanes / 2 * kFewSteps >= t.packs) t.lanes /= 2;
    t.width = kThreads / t.lanes;
  } else {
    const int most = MaxWidth(pack, static_cast<int>(SizeOf(dtype)));
    t.width = static_cast<unsigned>(CeilDivide(columns, CeilDivide(columns, most)));
    t.lanes = kThreads / t.width;
  }
  t.mergers = kWarp;
  while (t.mergers * t.width * t.column_channels > kThreads) t.mergers /= 2;
  t.tile_packs = static_cast<int>(t.lanes) * Steps(pack);
  t.slices = static_cast<std::uint32_t>(CeilDivide(columns, t.width));
  t.splits = static_cast<std::uint32_t>(CeilDivide(t.packs, t.tile_packs));
  t.run_stride = shape.channels * shape.inner;
  t.step_packs = static_cast<int>(t.lanes % t.run_packs);
  t.step = t.lanes / t.run_packs * t.run_stride + t.step_packs * pack;
  return t;
}

// Goes through a lane's packs of a tile.
template <typename Traits>
class Walk {
 public:
  __device__ Walk(const Tiling& tiling, std::int64_t channel, std::int64_t pack) : t_(tiling) {
    if constexpr (Traits::kChannelsFirst) {
      const std::int64_t position = pack % t_.run_packs;
      left_ = Clamp(t_.run_packs - position);
      offset_ = channel * t_.inner + position * Traits::kPack + pack / t_.run_packs * t_.run_stride;
    } else {
      offset_ = channel + pack * t_.run_stride;
    }
  }

  // In elements, from the array's begin.
  __device__ std::int64_t offset() const { return offset_; }

  __device__ void Next() {
    offset_ += t_.step;
    if constexpr (Traits::kChannelsFirst) {
      left_ -= t_.step_packs;
      if (left_ > 0) return;
      left_ += Clamp(t_.run_packs);
      offset_ += t_.run_stride - t_.inner;
    }
  }

 private:
  // Lengths beyond a tile's need not be told apart, so they fit into an int.
  static __device__ int Clamp(std::int64_t packs) {
    constexpr int kLong = 1 << 30;
    return packs < kLong ? static_cast<int>(packs) : kLong;
  }

  const Tiling& t_;
  std::int64_t offset_;
  int left_ = 0;  // packs to the end of the run
};

// A tile as one of its threads sees it. Slots number the tile's channels such that neighbouring
// threads have neighbouring slots: shared memory that is indexed by slot has no bank conflicts.
template <typename Traits>
class Tile {
 public:
  __device__ Tile(const Tiling& tiling, std::uint32_t index)
      : t_(tiling), slice_(index % t_.slices), split_(index / t_.slices) {
    column_ = Traits::kChannelsFirst ? threadIdx.x / t_.lanes : threadIdx.x % t_.width;
    lane_ =
        static_cast<int>(Traits::kChannelsFirst ? threadIdx.x % t_.lanes : threadIdx.x / t_.width);
    const std::int64_t left = t_.packs - first_pack();
    packs_ = left < t_.tile_packs ? static_cast<int>(left) : t_.tile_packs;
    if (lane_ >= lanes() || channel(0) >= t_.channels) packs_ = 0;
  }

  __device__ const Tiling& tiling() const { return t_; }
  __device__ std::uint32_t split() const { return split_; }
  __device__ int lane() const { return lane_; }
  __device__ int lanes() const { return static_cast<int>(t_.lanes); }
  __device__ std::int64_t first_pack() const { return std::int64_t{split_} * t_.tile_packs; }
  __device__ int packs() const { return packs_; }  // of this thread's column: 0 if it has none
  __device__ std::int64_t channel(int j) const { return ChannelOf(column_) + j; }
  __device__ unsigned slot(int j) const { return static_cast<unsigned>(j) * t_.width + column_; }

  __device__ Walk<Traits> Begin() const {
    return Walk<Traits>(t_, channel(0), first_pack() + lane_);
  }

  __device__ unsigned slots() const { return t_.width * Traits::kChannels; }
  __device__ std::int64_t ChannelOf(unsigned slot) const {
    const std::int64_t first_column = std::int64_t{slice_} * t_.width;
    return (first_column + slot % t_.width) * Traits::kChannels + slot / t_.width;
  }
  __device__ unsigned ThreadOf(unsigned column, unsigned lane) const {
    return Traits::kChannelsFirst ? column * t_.lanes + lane : lane * t_.width + column;
  }

 private:
  const Tiling& t_;
  const std::uint32_t slice_;
  const std::uint32_t split_;
  unsigned column_;
  int lane_;
  int packs_;
};

template <typename Traits, typename Function>
__device__ void ForEachSlot(const Tile<Traits>& tile, Function function) {
  const unsigned slot = threadIdx.x;
  if (slot >= tile.slots()) return;
  const std::int64_t channel = tile.ChannelOf(slot);
  if (channel < tile.tiling().channels) function(slot, channel);
}

template <typename Traits>
__device__ typename Traits::Word Load(const typename Traits::T* from) {
  return *reinterpret_cast<const typename Traits::Word*>(from);
}

// Loads what is not read again, without displacing other data from the cache.
template <typename Traits>
__device__ typename Traits::Word LoadLast(const typename Traits::T* from) {
  if constexpr (Traits::kPack == 1) {
    return *from;
  } else {
    return __ldcs(reinterpret_cast<const typename Traits::Word*>(from));
  }
}

// Stores without displacing other data from the cache.
template <typename Traits>
__device__ void Store(typename Traits::T* to, const typename Traits::Pack& pack) {
  typename Traits::Word word;
  std::memcpy(&word, &pack, sizeof(pack));
  if constexpr (Traits::kPack == 1) {
    *to = word;
  } else {
    __stcs(reinterpret_cast<typename Traits::Word*>(to), word);
  }
}

template <typename Traits>
__device__ typename Traits::Pack Unpack(const typename Traits::Word& word) {
  typename Traits::Pack pack;
  std::memcpy(&pack, &word, sizeof(pack));
  return pack;
}

inline __device__ void Round(float x, float& to) { to = x; }
inline __device__ void Round(double x, double& to) { to = x; }
inline __device__ void Round(float x, cuda::Float16& to) { to.bits = cuda::FloatToHalf(x); }
inline __device__ void Round(float x, cuda::BFloat16& to) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const unsigned bits = __float_as_uint(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = static_cast<std::uint16_t>(is_nan ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

// Each thread's sums, for each channel of its column.
template <typename Traits, int kQuantities>
struct TileSums {
  typename Traits::Statistic value[kQuantities][Traits::kChannels][kThreads];
};

// Adds up a pack's values in the first one, where a column is one channel.
template <typename Traits>
__device__ void FoldPack(typename Traits::Statistic (&value)[Traits::kPack]) {
#pragma unroll
  for (int half = Traits::kPack / 2; half >= Traits::kChannels; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) value[j] += value[j + half];
  }
}

// The sums that tiles leave, ordered by split and within a split by channel.
struct Partials {
  double* first;
  double* second;
  std::int64_t* count;  // values of a channel in each split, the same for all channels

  static std::int64_t Bytes(const Tiling& t) {
    return t.splits * (2 * t.channels + 1) * static_cast<std::int64_t>(sizeof(double));
  }
  static Partials In(void* workspace, const Tiling& t) {
    auto* first = static_cast<double*>(workspace);
    auto* second = first + t.splits * t.channels;
    return {first, second, reinterpret_cast<std::int64_t*>(second + t.splits * t.channels)};
  }
};

template <typename Sums>
__device__ Sums ShuffleDown(const Sums& sums, unsigned offset, int width) {
  constexpr int kWords = sizeof(Sums) / sizeof(double);
  double word[kWords];
  std::memcpy(word, &sums, sizeof(sums));
#pragma unroll
  for (double& w : word) w = __shfl_down_sync(kAllLanes, w, offset, width);
  Sums result;
  std::memcpy(&result, word, sizeof(sums));
  return result;
}

// Adds up the lanes of each channel of a tile: write(channel, read(thread, j) + ...), the channel
// being the j-th of that thread's column.
template <typename Sums, typename Traits, typename Read, typename Write>
__device__ void MergeTile(const Tile<Traits>& tile, Read read, Write write) {
  const Tiling& t = tile.tiling();
  const unsigned slot = threadIdx.x / t.mergers;
  const unsigned merger = threadIdx.x % t.mergers;
  const bool exists = slot < tile.slots() && tile.ChannelOf(slot) < t.channels;
  Sums sums = {};
  if (exists) {
    for (unsigned lane = merger; lane < t.lanes; lane += t.mergers) {
      sums.Add(read(tile.ThreadOf(slot % t.width, lane), slot / t.width));
    }
  }
  for (unsigned offset = t.mergers / 2; offset > 0; offset /= 2) {
    sums.Add(ShuffleDown(sums, offset, static_cast<int>(t.mergers)));
  }
  if (exists && merger == 0) write(tile.ChannelOf(slot), sums);
}

// Channels of a block, in the kernels that add up splits: as many doubles as a memory sector has.
constexpr int kBlockChannels = 4;

inline std::int64_t MergeBlocks(const Tiling& t) { return CeilDivide(t.channels, kBlockChannels); }

__device__ inline std::int64_t MergeChannel() {
  return std::int64_t{blockIdx.x} * kBlockChannels + threadIdx.x % kBlockChannels;
}

// Adds up the splits of MergeChannel(), `read(split) + …`; the first kBlockChannels threads have
// the result. All threads call it.
template <typename Sums, typename Read>
__device__ Sums MergeSplits(std::uint32_t splits, Read read) {
  constexpr int kMergeBatch = 4;
  constexpr int kWarps = kThreads / kWarp;
  constexpr unsigned kMergers = kThreads / kBlockChannels;
  ACCUMOPS_SHARED(shared, Sums[kWarps][kBlockChannels]);
  Sums sums = {};
  for (std::uint32_t first = threadIdx.x / kBlockChannels; first < splits;
       first += kMergeBatch * kMergers) {
    Sums part[kMergeBatch];
#pragma unroll
    for (int k = 0; k < kMergeBatch; ++k) {
      const std::uint32_t split = first + static_cast<std::uint32_t>(k) * kMergers;
      part[k] = split < splits ? read(split) : Sums{};
    }
#pragma unroll
    for (const Sums& p : part) sums.Add(p);
  }
#pragma unroll
  for (unsigned offset = kWarp / 2; offset >= kBlockChannels; offset /= 2) {
    sums.Add(ShuffleDown(sums, offset, kWarp));
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane < kBlockChannels) shared[warp][lane] = sums;
  __syncthreads();
  if (warp == 0 && lane < kBlockChannels) {
    for (int w = 1; w < kWarps; ++w) sums.Add(shared[w][lane]);
  }
  return sums;
}

// How many elements move in one access: as many as 16 bytes have, as 8 bytes have, or one.
inline int ChoosePack(const BatchNormShape& shape, DType dtype,
                      std::initializer_list<const void*> arrays) {
  const std::int64_t contiguous = shape.inner != 1 ? shape.inner : shape.channels;
  const int size = static_cast<int>(SizeOf(dtype));
  for (int bytes = cuda::kVectorBytes; bytes >= 8 && bytes > size; bytes /= 2) {
    bool fits = contiguous % (bytes / size) == 0;
    for (const void* array : arrays) {
      fits = fits && reinterpret_cast<std::uintptr_t>(array) % bytes == 0;
    }
    if (fits) return bytes / size;
  }
  return 1;
}

template <template <typename> typename Kernels, typename T, bool kChannelsFirst,
          typename... Arguments>
cudaError_t RunWithPack(int pack, const Arguments&... arguments) {
  constexpr int kWide = cuda::kVectorBytes / static_cast<int>(sizeof(T));
  if (pack == kWide) return Kernels<Traits<T, kWide, kChannelsFirst>>::Run(arguments...);
  if (pack == kWide / 2) return Kernels<Traits<T, kWide / 2, kChannelsFirst>>::Run(arguments...);
  return Kernels<Traits<T, 1, kChannelsFirst>>::Run(arguments...);
}

template <template <typename> typename Kernels, typename T, typename... Arguments>
cudaError_t RunWithLayout(bool channels_first, int pack, const Arguments&... arguments) {
  return channels_first ? RunWithPack<Kernels, T, true>(pack, arguments...)
                        : RunWithPack<Kernels, T, false>(pack, arguments...);
}

// Tiles the arrays and calls Kernels<Traits>::Run(tiling, arguments...) with the traits that fit.
template <template <typename> typename Kernels, typename... Arguments>
const char* Run(const BatchNormShape& shape, DType dtype, std::initializer_list<const void*> arrays,
                const Arguments&... arguments) {
  const int pack = ChoosePack(shape, dtype, arrays);
  const Tiling tiling = MakeTiling(shape, dtype, pack);
  const auto run = [&](auto* function) {
    return cuda::ErrorText(function(tiling.channels_first, pack, tiling, arguments...));
  };
  switch (dtype) {
    case DType::kFloat16:
      return run(RunWithLayout<Kernels, cuda::Float16, Tiling, Arguments...>);
    case DType::kBFloat16:
      return run(RunWithLayout<Kernels, cuda::BFloat16, Tiling, Arguments...>);
    case DType::kFloat32:
      return run(RunWithLayout<Kernels, float, Tiling, Arguments...>);
    case DType::kFloat64:
      return run(RunWithLayout<Kernels, double, Tiling, Arguments...>);
  }
  return cuda::ErrorText(cudaErrorInvalidValue);
}

}  // namespace batch_norm
}  // namespace accumops
