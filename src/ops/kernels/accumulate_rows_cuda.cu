// Scatters rows in a fixed order, without atomics, sorting or a workspace. Why it is built this
// way:
//
// - Rows are dealt to groups by a hash, and columns to slices of one cache line. A block owns one
//   group in one slice, so nobody else writes there and the order is the block's own affair.
// - Every block scans all indices and lists the positions of its own rows, in order. That reads the
//   indices once a block, but out of the L2 cache; a sort would need memory of its own.
// - It takes the list in rounds of 128 entries. All threads fetch: one round's values are on their
//   way while the previous round is added, and duplicates do not hold each other up. Then, for each
//   distinct row, the threads of its first entry add up all of the row's entries from shared
//   memory. So a row that occurs a million times costs additions, not a million trips to memory.
#include "accumulate_rows.h"
#include "cuda_common.cuh"

namespace accumops {
namespace {

using cuda::kAllLanes;
using cuda::kPackSize;
using cuda::kWarp;
using cuda::Pack;

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLanes = 8;                     // threads that share an entry
constexpr int kEntries = kThreads / kLanes;   // of a round
constexpr int kMaskWords = kEntries / kWarp;  // a bit for each entry of a round
constexpr int kEntriesPerWarp = kWarp / kLanes;
constexpr int kIndicesPerThread = 4;
constexpr int kTile = kThreads * kIndicesPerThread;  // indices scanned at once
constexpr int kListCapacity = kTile * 3 / 2;
constexpr std::int64_t kNoRow = -1;

template <typename Acc>
constexpr int kSliceSize = kLanes * kPackSize<Acc>;  // columns

struct ScatterParams {
  void* accumulator;
  const void* values;
  const void* indices;
  bool* touched_rows;
  bool* all_finite;
  DeviceScalar scale;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t count;
  std::uint32_t slices;
  std::uint32_t groups;
  bool indices_are_int64;
  bool aligned;  // whether every row of accumulator and values can be read in packs
};

// Multiplicative hashing: the high bits of the product choose the group.
__host__ __device__ inline std::uint32_t GroupOfRow(std::int64_t row, std::uint32_t groups) {
  const auto bits = static_cast<std::uint64_t>(row);
  const auto hash = static_cast<std::uint32_t>(bits ^ (bits >> 32)) * 0x9e3779b1u;
  return static_cast<std::uint32_t>((static_cast<std::uint64_t>(hash) * groups) >> 32);
}

template <typename Acc, typename Grad>
class Scatter {
 public:
  struct Shared {
    std::uint32_t list[kListCapacity];  // positions, counted from `list_base_`
    int warp_count[2][kWarps];
    std::int64_t row[kEntries];
    Pack<Acc, kPackSize<Acc>> product[kEntries][kLanes];
  };

  __device__ Scatter(const ScatterParams& params, Shared& shared)
      : p_(params),
        shared_(shared),
        scale_(static_cast<Acc>(cuda::ReadScale(params.scale))),
        group_(blockIdx.x / params.slices),
        slice_(blockIdx.x % params.slices),
        lane_in_warp_(static_cast<int>(threadIdx.x) % kWarp),
        warp_(static_cast<int>(threadIdx.x) / kWarp),
        lane_(static_cast<int>(threadIdx.x) % kLanes),
        entry_(static_cast<int>(threadIdx.x) / kLanes),
        column_(static_cast<std::int64_t>(slice_) * kSliceSize<Acc> +
                (params.aligned ? lane_ * kPackSize<Acc> : lane_)) {}

  __device__ void Run() {
    if (scale_ == 0 && p_.all_finite == nullptr) return;
    int parity = 0;
    for (std::int64_t tile = 0; tile < p_.count; tile += kTile) {
      ListTile(tile, parity);
      parity ^= 1;
      const std::int64_t next = tile + kTile;
      const bool full = listed_ > kListCapacity - kTile;
      const bool too_far = next + kTile - list_base_ > std::int64_t{UINT32_MAX};
      if (next >= p_.count || full || too_far) {
        AddListed();
        list_base_ = next;
        listed_ = 0;
      }
    }
    if (!finite_ && p_.all_finite != nullptr) cuda::SetFromAnyThread(p_.all_finite, false);
  }

 private:
  using AccPack = Pack<Acc, kPackSize<Acc>>;
  using GradPack = Pack<Grad, kPackSize<Acc>>;

  struct Fetched {
    uint2 index;  // NoIndex() beyond the list's end
    GradPack value;
  };

  // Appends the positions within [tile, tile + kTile) whose rows are this block's, in order. Calls
  // alternate `parity`: a warp that is still reading the counts must not see the next tile's.
  __device__ void ListTile(std::int64_t tile, int parity) {
    const std::int64_t first = tile + warp_ * kWarp * kIndicesPerThread + lane_in_warp_;
    uint2 index[kIndicesPerThread];
#pragma unroll
    for (int k = 0; k < kIndicesPerThread; ++k) {
      const std::int64_t position = first + k * kWarp;
      index[k] = NoIndex();
      if (position < p_.count) index[k] = LoadIndex(position);
    }
    unsigned owned[kIndicesPerThread];
    int in_warp = 0;
#pragma unroll
    for (int k = 0; k < kIndicesPerThread; ++k) {
      const std::int64_t row = RowOf(index[k]);
      const bool in_range = static_cast<std::uint64_t>(row) < static_cast<std::uint64_t>(p_.rows);
      owned[k] = __ballot_sync(kAllLanes, in_range && GroupOfRow(row, p_.groups) == group_);
      in_warp += __popc(owned[k]);
    }
    if (lane_in_warp_ == 0) shared_.warp_count[parity][warp_] = in_warp;
    __syncthreads();
    int up_to_warp = shared_.warp_count[parity][lane_in_warp_];  // an inclusive sum, soon
#pragma unroll
    for (int distance = 1; distance < kWarps; distance *= 2) {
      const int other = __shfl_up_sync(kAllLanes, up_to_warp, distance);
      if (lane_in_warp_ >= distance) up_to_warp += other;
    }
    int at = listed_ + __shfl_sync(kAllLanes, up_to_warp, warp_) - in_warp;
    listed_ += __shfl_sync(kAllLanes, up_to_warp, kWarps - 1);
    const unsigned lower_lanes = (1u << lane_in_warp_) - 1;
#pragma unroll
    for (int k = 0; k < kIndicesPerThread; ++k) {
      if (owned[k] >> lane_in_warp_ & 1) {
        shared_.list[at + __popc(owned[k] & lower_lanes)] =
            static_cast<std::uint32_t>(first + k * kWarp - list_base_);
      }
      at += __popc(owned[k]);
    }
  }

  __device__ void AddListed() {
    __syncthreads();
    Fetched next = Fetch(entry_);
    for (int first = 0; first < listed_; first += kEntries) {
      const std::int64_t row = RowOf(next.index);
      if (lane_ == 0) shared_.row[entry_] = row;
      shared_.product[entry_][lane_] = Product(next.value);
      next = Fetch(first + kEntries + entry_);
      __syncthreads();
      AddRound(row);
      __syncthreads();
    }
  }

  __device__ Fetched Fetch(int listed) const {
    Fetched result = {NoIndex(), {}};
    if (listed < listed_) {
      const std::int64_t position = list_base_ + shared_.list[listed];
      result.index = LoadIndex(position);
      result.value =
          LoadColumns<GradPack>(static_cast<const Grad*>(p_.values) + position * p_.columns);
    }
    return result;
  }

  // Adds the products in shared memory to their rows. The first entry of a row does it for all.
  // With a scale of 0 there is nothing to add: the entries were fetched for their finiteness only.
  __device__ void AddRound(std::int64_t row) {
    unsigned same_row[kMaskWords];
    FindSameRow(same_row);
    unsigned earlier = 0;
#pragma unroll
    for (int k = 0; k < kMaskWords; ++k) earlier |= same_row[k] & BitsBelow(entry_ - k * kWarp);
    if (row == kNoRow || earlier != 0 || scale_ == 0) return;
    if (slice_ == 0 && lane_ == 0 && p_.touched_rows != nullptr) p_.touched_rows[row] = true;
    Acc* to = static_cast<Acc*>(p_.accumulator) + row * p_.columns;
    AccPack sum = LoadColumns<AccPack>(to);
#pragma unroll
    for (int k = 0; k < kMaskWords; ++k) {
      AddEntries(same_row[k], &shared_.product[k * kWarp], sum);
    }
    StoreColumns(to, sum);
  }

  // Sets a bit for each entry of the round that has the same row as this thread's entry.
  __device__ void FindSameRow(unsigned (&same_row)[kMaskWords]) const {
    std::int64_t row[kMaskWords];
#pragma unroll
    for (int k = 0; k < kMaskWords; ++k) row[k] = shared_.row[k * kWarp + lane_in_warp_];
#pragma unroll
    for (int i = 0; i < kEntriesPerWarp; ++i) {
      const std::int64_t wanted = shared_.row[warp_ * kEntriesPerWarp + i];
#pragma unroll
      for (int k = 0; k < kMaskWords; ++k) {
        const unsigned equal = __ballot_sync(kAllLanes, row[k] == wanted);
        if (lane_in_warp_ / kLanes == i) same_row[k] = equal;
      }
    }
  }

  static __device__ unsigned BitsBelow(int bit) {
    return bit <= 0 ? 0u : bit >= kWarp ? kAllLanes : (1u << bit) - 1;
  }

  __device__ void AddEntries(unsigned entries, const AccPack (*product)[kLanes],
                             AccPack& sum) const {
    // With many entries all products are read, so that the reads do not wait for one another.
    if (__popc(entries) > kWarp / 4) {
#pragma unroll 8
      for (int i = 0; i < kWarp; ++i) {
        const AccPack addend = product[i][lane_];
        if (entries >> i & 1) AddTo(sum, addend);
      }
      return;
    }
    for (; entries != 0; entries &= entries - 1) AddTo(sum, product[__ffs(entries) - 1][lane_]);
  }

  static __device__ void AddTo(AccPack& sum, const AccPack& addend) {
#pragma unroll
    for (int j = 0; j < kPackSize<Acc>; ++j) {
      sum.value[j] = cuda::Add(sum.value[j], addend.value[j]);
    }
  }

  __device__ AccPack Product(const GradPack& gradient) {
    AccPack result;
#pragma unroll
    for (int j = 0; j < kPackSize<Acc>; ++j) {
      const Acc x = static_cast<Acc>(cuda::ToFloat(gradient.value[j]));
      finite_ = finite_ && cuda::IsFinite(x);
      result.value[j] = cuda::Multiply(scale_, x);
    }
    return result;
  }

  // An index as it is in memory, lower half first. Widening an int32 right here would wait for it
  // and hold up the loads that follow.
  __device__ uint2 LoadIndex(std::int64_t position) const {
    if (p_.indices_are_int64) return static_cast<const uint2*>(p_.indices)[position];
    return make_uint2(static_cast<const unsigned*>(p_.indices)[position], 0);
  }

  // RowOf() makes it kNoRow in either width.
  static __device__ uint2 NoIndex() { return make_uint2(0xffffffffu, 0xffffffffu); }

  __device__ std::int64_t RowOf(uint2 index) const {
    if (!p_.indices_are_int64) return static_cast<std::int32_t>(index.x);
    return static_cast<std::int64_t>(std::uint64_t{index.y} << 32 | index.x);
  }

  // This thread's columns of a row: adjacent ones where the rows are aligned, else every eighth, so
  // that neighbours still read neighbours. Columns beyond the last read as zero.
  template <typename P, typename T>
  __device__ P LoadColumns(const T* row) const {
    P result = {};
    if (p_.aligned) {
      if (column_ < p_.columns) result = cuda::LoadPack(reinterpret_cast<const P*>(row + column_));
      return result;
    }
#pragma unroll
    for (int j = 0; j < kPackSize<Acc>; ++j) {
      const std::int64_t column = column_ + j * kLanes;
      if (column < p_.columns) result.value[j] = row[column];
    }
    return result;
  }

  __device__ void StoreColumns(Acc* row, const AccPack& pack) const {
    if (p_.aligned) {
      if (column_ < p_.columns) cuda::StorePack(reinterpret_cast<AccPack*>(row + column_), pack);
      return;
    }
#pragma unroll
    for (int j = 0; j < kPackSize<Acc>; ++j) {
      const std::int64_t column = column_ + j * kLanes;
      if (column < p_.columns) row[column] = pack.value[j];
    }
  }

  const ScatterParams& p_;
  Shared& shared_;
  const Acc scale_;
  const std::uint32_t group_;
  const std::uint32_t slice_;
  const int lane_in_warp_;
  const int warp_;
  const int lane_;   // within the threads of an entry
  const int entry_;  // within a round
  const std::int64_t column_;
  std::int64_t list_base_ = 0;
  int listed_ = 0;
  bool finite_ = true;
};

template <typename Acc, typename Grad>
__global__ void __launch_bounds__(kThreads, 1)
    ScatterKernel(ACCUMOPS_PARAMS(ScatterParams) params) {
  ACCUMOPS_SHARED(shared, typename Scatter<Acc, Grad>::Shared);
  Scatter<Acc, Grad>(params, shared).Run();
}

struct ClearParams {
  void* accumulator;
  bool* touched_rows;
  const bool* overwrite;
  std::int64_t rows;
  std::int64_t row_bytes;
};

constexpr int kClearThreads = 256;

// Clears bytes that begin and end on a multiple of 4. Threads 0 … threads - 1 share them; at
// least 8.
__device__ void Clear(char* begin, std::int64_t bytes, std::int64_t thread, std::int64_t threads) {
  constexpr int kWord = 4;
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  const std::int64_t to_boundary = -address % cuda::kVectorBytes;
  const std::int64_t head = to_boundary < bytes ? to_boundary : bytes;
  const std::int64_t vectors = (bytes - head) / cuda::kVectorBytes;
  auto* vector = reinterpret_cast<uint4*>(begin + head);
  for (std::int64_t i = thread; i < vectors; i += threads) vector[i] = make_uint4(0, 0, 0, 0);
  std::int64_t edge = thread * kWord;
  if (edge >= head) edge += vectors * cuda::kVectorBytes;
  if (edge < bytes) *reinterpret_cast<unsigned*>(begin + edge) = 0;
}

__global__ void __launch_bounds__(kClearThreads) ClearKernel(ACCUMOPS_PARAMS(ClearParams) p) {
  if (!*p.overwrite) return;
  const std::int64_t thread = std::int64_t{blockIdx.x} * kClearThreads + threadIdx.x;
  const std::int64_t threads = std::int64_t{gridDim.x} * kClearThreads;
  auto* accumulator = static_cast<char*>(p.accumulator);
  if (p.touched_rows == nullptr) {
    Clear(accumulator, p.rows * p.row_bytes, thread, threads);
    return;
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (std::int64_t first = thread - lane; first < p.rows; first += threads) {
    const std::int64_t row = first + lane;
    const bool touched = row < p.rows && p.touched_rows[row];
    if (touched) p.touched_rows[row] = false;
    unsigned left = __ballot_sync(kAllLanes, touched);
    for (; left != 0; left &= left - 1) {
      Clear(accumulator + (first + __ffs(left) - 1) * p.row_bytes, p.row_bytes, lane, kWarp);
    }
  }
}

cudaError_t LaunchClear(const AccumulateRowsItem& item, const bool* overwrite, int processors,
                        cudaStream_t stream) {
  const auto row_bytes = item.columns * static_cast<std::int64_t>(SizeOf(item.accumulator_dtype));
  const ClearParams params = {item.accumulator, item.touched_rows, overwrite, item.rows, row_bytes};
  const std::int64_t useful_threads =
      item.touched_rows != nullptr ? item.rows : item.rows * row_bytes / cuda::kVectorBytes;
  const std::int64_t useful = useful_threads / kClearThreads + 1;
  const std::int64_t resident = std::int64_t{processors} * 8;
  return cuda::Launch(ClearKernel, useful < resident ? useful : resident, kClearThreads, params,
                      stream);
}

// The fewest groups that leave few processors idle: each group scans the indices once more.
std::uint32_t ChooseGroups(std::int64_t slices, std::int64_t processors) {
  std::int64_t groups = processors / slices > 1 ? processors / slices : 1;
  for (;; ++groups) {
    const std::int64_t blocks = groups * slices;
    const std::int64_t waves = (blocks - 1) / processors + 1;
    if (blocks * 10 >= waves * processors * 9) return static_cast<std::uint32_t>(groups);
  }
}

bool IsAligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

template <typename Acc, typename Grad>
cudaError_t LaunchScatter(const AccumulateRowsItem& item, DeviceScalar scale, bool* all_finite,
                          int processors, cudaStream_t stream) {
  const std::int64_t slices = (item.columns - 1) / kSliceSize<Acc> + 1;
  ScatterParams params = {};
  params.accumulator = item.accumulator;
  params.values = item.values;
  params.indices = item.indices;
  params.touched_rows = item.touched_rows;
  params.all_finite = all_finite;
  params.scale = scale;
  params.rows = item.rows;
  params.columns = item.columns;
  params.count = item.count;
  params.slices = static_cast<std::uint32_t>(slices);
  params.groups = ChooseGroups(slices, processors);
  params.indices_are_int64 = item.indices_are_int64;
  params.aligned = item.columns % kPackSize<Acc> == 0 &&
                   IsAligned(item.accumulator, cuda::kVectorBytes) &&
                   IsAligned(item.values, kPackSize<Acc> * sizeof(Grad));
  return cuda::Launch(ScatterKernel<Acc, Grad>, slices * params.groups, kThreads, params, stream);
}

template <typename Acc>
cudaError_t LaunchScatter(const AccumulateRowsItem& item, DeviceScalar scale, bool* all_finite,
                          int processors, cudaStream_t stream) {
  switch (item.values_dtype) {
    case DType::kFloat16:
      return LaunchScatter<Acc, cuda::Float16>(item, scale, all_finite, processors, stream);
    case DType::kBFloat16:
      return LaunchScatter<Acc, cuda::BFloat16>(item, scale, all_finite, processors, stream);
    case DType::kFloat32:
      return LaunchScatter<Acc, float>(item, scale, all_finite, processors, stream);
    case DType::kFloat64:
      if constexpr (sizeof(Acc) == 8) {
        return LaunchScatter<Acc, double>(item, scale, all_finite, processors, stream);
      }
  }
  return cudaErrorInvalidValue;
}

cudaError_t LaunchBoth(const AccumulateRowsItem& item, DeviceScalar scale, const bool* overwrite,
                       bool* all_finite, cudaStream_t stream) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  int processors = 0;
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    return error;
  }
  error = LaunchClear(item, overwrite, processors, stream);
  if (error != cudaSuccess || item.count == 0) return error;
  return item.accumulator_dtype == DType::kFloat64
             ? LaunchScatter<double>(item, scale, all_finite, processors, stream)
             : LaunchScatter<float>(item, scale, all_finite, processors, stream);
}

}  // namespace

const char* AccumulateRowsCuda(const AccumulateRowsItem& item, DeviceScalar scale,
                               const bool* overwrite, bool* all_finite, CUstream_st* stream) {
  if (item.rows == 0 || item.columns == 0) return nullptr;
  return cuda::ErrorText(LaunchBoth(item, scale, overwrite, all_finite, stream));
}

}  // namespace accumops
