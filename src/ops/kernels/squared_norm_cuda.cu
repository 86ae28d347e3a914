// The sum of each chunk goes to the workspace, and chunk_sums.cuh adds up the chunks of each
// tensor. Why it is built this way:
//
// - Chunks are as in accumulate_cuda.cu. Which thread adds what, and in which order, follows from a
//   tensor's size and type; where a tensor is not aligned, its packs are read value by value.
// - In float64 the square of a float32 is exact, and a GPU for computing converts and adds as fast
//   as it reads. Where the float64 rate is 1/64 of float32's, conversions and sums wait for the
//   float64 units: always with 16-bit types, and with float32 where such a GPU has fast memory.
#include "chunk_sums.cuh"
#include "cuda_common.cuh"
#include "squared_norm.h"
#include "tensor_table.cuh"

namespace accumops {
namespace {

using cuda::kVectorBytes;
using cuda::Pack;

constexpr int kThreads = 256;
constexpr int kPacksPerThread = 8;
constexpr int kChunkBytes = kThreads * kPacksPerThread * kVectorBytes;

template <typename T>
constexpr int kChunkSize = kChunkBytes / static_cast<int>(sizeof(T));  // values

std::int64_t ChunksOf(const SquaredNormItem& item) {
  return cuda::ChunksOf(item.size, kChunkBytes / static_cast<std::int64_t>(SizeOf(item.dtype)));
}

template <int kTableCapacity>
struct ChunkParams {
  static constexpr int kCapacity = kTableCapacity;

  const void* values[kCapacity];
  std::int64_t size[kCapacity];
  // Ascending; chunks are counted through the table. Negative where an earlier grid began the item.
  std::int64_t first_chunk[kCapacity];
  DType dtype[kCapacity];
  double* sums;  // of the table's chunks
  int count;
};

constexpr int kSmallCapacity = 160;
using SmallParams = ChunkParams<kSmallCapacity>;
using MediumParams = ChunkParams<cuda::LargeCapacity(416, kSmallCapacity)>;
using LargeParams = ChunkParams<cuda::LargeCapacity(1280, kSmallCapacity)>;

// Adds up a thread's values, in order: its packs are kThreads packs apart.
template <typename T>
class ThreadSum {
 public:
  __device__ ThreadSum(const T* values, int size) : values_(values), size_(size) {}

  __device__ double Run() {
    if (reinterpret_cast<std::uintptr_t>(values_) % kVectorBytes == 0) {
      AddPacks();
    } else {
#pragma unroll 2
      for (int k = 0; k < kPacksPerThread; ++k) AddSingly(First(k));
    }
    return sum_;
  }

 private:
  static constexpr int kPack = cuda::kPackSize<T>;

  __device__ int First(int k) const {
    return (k * kThreads + static_cast<int>(threadIdx.x)) * kPack;
  }

  __device__ void AddPacks() {
    // What waits to be used stays packed: 16-bit values would take a register each.
    uint4 word[kPacksPerThread];
#pragma unroll
    for (int k = 0; k < kPacksPerThread; ++k) {
      word[k] = make_uint4(0, 0, 0, 0);
      if (First(k) + kPack <= size_) {
        word[k] = *reinterpret_cast<const uint4*>(values_ + First(k));
      }
    }
#pragma unroll
    for (int k = 0; k < kPacksPerThread; ++k) {
      Pack<T, kPack> pack;
      std::memcpy(&pack, &word[k], sizeof(pack));
#pragma unroll
      for (int j = 0; j < kPack; ++j) Add(pack.value[j]);
    }
    // The incomplete pack is the last in its thread's order: from it on, zeros were added above.
    const int packs = size_ / kPack;
    if (packs % kThreads == static_cast<int>(threadIdx.x)) AddSingly(packs * kPack);
  }

  __device__ void AddSingly(int first) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      if (first + j < size_) Add(values_[first + j]);
    }
  }

  __device__ void Add(T x) {
    const double value = static_cast<double>(cuda::ToFloat(x));
    sum_ = fma(value, value, sum_);
  }

  const T* const values_;
  const int size_;
  double sum_ = 0;
};

template <typename T>
__device__ double SumOfThread(const void* values, std::int64_t size, std::int64_t chunk) {
  const std::int64_t begin = chunk * kChunkSize<T>;
  const std::int64_t left = size - begin;
  return ThreadSum<T>(static_cast<const T*>(values) + begin,
                      left < kChunkSize<T> ? static_cast<int>(left) : kChunkSize<T>)
      .Run();
}

template <typename Params>
__global__ void __launch_bounds__(kThreads, 3) ChunksKernel(ACCUMOPS_PARAMS(Params) params) {
  const std::int64_t block = blockIdx.x;
  const int entry = cuda::FindEntry(params.first_chunk, params.count, block);
  const auto add = [&](auto* function) {
    return function(params.values[entry], params.size[entry], block - params.first_chunk[entry]);
  };
  double sum = 0;
  switch (params.dtype[entry]) {
    case DType::kFloat16:
      sum = add(SumOfThread<cuda::Float16>);
      break;
    case DType::kBFloat16:
      sum = add(SumOfThread<cuda::BFloat16>);
      break;
    case DType::kFloat32:
      sum = add(SumOfThread<float>);
      break;
    case DType::kFloat64:
      sum = add(SumOfThread<double>);
      break;
  }
  sum = cuda::SumOfBlock<kThreads>(sum);
  if (threadIdx.x == 0) params.sums[block] = sum;
}

template <typename Params>
cudaError_t LaunchChunks(const SquaredNormItem* items, std::size_t count, double* chunk_sums,
                         cudaStream_t stream) {
  Params params;
  params.sums = chunk_sums;
  return cuda::ForEachTable(
      count, Params::kCapacity, [&](std::size_t i) { return ChunksOf(items[i]); },
      [&](std::size_t i, const cuda::TablePart& part) {
        params.values[part.entry] = items[i].values;
        params.size[part.entry] = items[i].size;
        params.first_chunk[part.entry] = part.first_chunk - part.begin;
        params.dtype[part.entry] = items[i].dtype;
      },
      [&](int entries, std::int64_t chunks) {
        params.count = entries;
        const cudaError_t error =
            cuda::Launch(ChunksKernel<Params>, chunks, kThreads, params, stream);
        params.sums += chunks;
        return error;
      });
}

}  // namespace

std::size_t SquaredNormsWorkspace(const SquaredNormItem* items, std::size_t count) {
  std::int64_t chunks = 0;
  for (std::size_t i = 0; i < count; ++i) chunks += ChunksOf(items[i]);
  return static_cast<std::size_t>(chunks) * sizeof(double);
}

const char* SquaredNormsCuda(const SquaredNormItem* items, std::size_t count, double* sums,
                             void* workspace, CUstream_st* stream) {
  if (items == nullptr || count == 0) return nullptr;
  auto* chunk_sums = static_cast<double*>(workspace);
  const auto launch = cuda::ChooseTable<SmallParams, LargeParams>(
      count, LaunchChunks<SmallParams>,
      count > MediumParams::kCapacity ? LaunchChunks<LargeParams> : LaunchChunks<MediumParams>);
  cudaError_t error = launch(items, count, chunk_sums, stream);
  if (error == cudaSuccess) {
    error = cuda::SumChunks(
        count, [&](std::size_t i) { return ChunksOf(items[i]); }, sums, chunk_sums, stream);
  }
  return cuda::ErrorText(error);
}

}  // namespace accumops
