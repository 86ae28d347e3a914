// Hundreds of tensors in one launch. Why it is built this way:
//
// - The tensor table travels as a kernel parameter: no copy to the device, no buffer to keep alive,
//   and the launch can be captured in a graph.
// - One block does one chunk of 16 KiB of accumulator and ends. The hardware's scheduler balances
//   tensors of every size, which fixed shares per block do not; and a chunk is just what 256
//   threads hold in registers at 4 packs each, so all of a chunk's loads are in flight together:
//   some 100 KiB an SM, a few times what latency times bandwidth asks for.
// - A block finds its tensor by binary search in the parameter bank. That is some ten cached loads,
//   hidden behind the other blocks' traffic; a map from block to tensor would not fit.
// - Squared norms have a kernel of their own: their float64 sums would cost all others registers.
#include "accumulate.h"
#include "chunk_sums.cuh"
#include "cuda_common.cuh"
#include "tensor_table.cuh"

namespace accumops {
namespace {

using cuda::kPackSize;
using cuda::Pack;

constexpr int kThreads = 256;
constexpr int kPacksPerThread = 4;
constexpr int kScalarsPerThread = 8;
constexpr int kChunkBytes = kThreads * kPacksPerThread * cuda::kVectorBytes;  // of accumulator

template <typename Acc>
constexpr int kChunkSize = kChunkBytes / static_cast<int>(sizeof(Acc));  // elements

// Pointers are at least aligned to their elements.
template <int kTableCapacity>
struct AccumulateParams {
  static constexpr int kCapacity = kTableCapacity;

  void* accumulator[kCapacity];
  const void* gradient[kCapacity];
  std::int64_t size[kCapacity];
  std::uint32_t first_chunk[kCapacity];  // ascending; chunks are counted through the table
  std::uint8_t kind[kCapacity];
  DeviceScalar scale;
  const bool* overwrite;
  bool* all_finite;
  double* chunk_norms;  // of the table's chunks: of the gradients, and accumulator_norms further on
  std::int64_t accumulator_norms;
  int count;
};

constexpr int kSmallCapacity = 136;
using SmallParams = AccumulateParams<kSmallCapacity>;
using MediumParams = AccumulateParams<cuda::LargeCapacity(416, kSmallCapacity)>;
using LargeParams = AccumulateParams<cuda::LargeCapacity(1120, kSmallCapacity)>;

constexpr std::uint8_t Kind(DType accumulator, DType gradient) {
  return static_cast<std::uint8_t>(static_cast<int>(accumulator) * 4 + static_cast<int>(gradient));
}

// A chunk is `head` scalars, `packs` packs at aligned addresses, and scalars to the end.
struct ChunkParts {
  int head;
  int packs;
  bool aligned;  // whether the gradient is aligned where the accumulator is
};

template <typename Acc, typename Grad>
__host__ __device__ ChunkParts SplitChunk(std::uintptr_t accumulator, std::uintptr_t gradient,
                                          int size) {
  const int misaligned = static_cast<int>(accumulator % cuda::kVectorBytes / sizeof(Acc));
  const int to_boundary = (kPackSize<Acc> - misaligned) % kPackSize<Acc>;
  const int head = to_boundary < size ? to_boundary : size;
  return {head, (size - head) / kPackSize<Acc>,
          (gradient + head * sizeof(Grad)) % (kPackSize<Acc> * sizeof(Grad)) == 0};
}

// What a thread has seen of its share of a chunk.
struct Seen {
  bool finite = true;
  double gradient = 0;     // the sum of its values' squares
  double accumulator = 0;  // the same
};

// Does one chunk. Gradients are read first: they need not wait for `overwrite` to arrive.
template <typename Acc, typename Grad, bool kNorms>
class ChunkAccumulator {
 public:
  __device__ ChunkAccumulator(Acc scale, bool overwrite) : scale_(scale), overwrite_(overwrite) {}

  __device__ void Run(Acc* accumulator, const Grad* gradient, int size) {
    const ChunkParts parts =
        SplitChunk<Acc, Grad>(reinterpret_cast<std::uintptr_t>(accumulator),
                              reinterpret_cast<std::uintptr_t>(gradient), size);
    if (!parts.aligned) {
      AccumulateScalars(accumulator, gradient, size);
      return;
    }
    AccumulatePacks(reinterpret_cast<AccPack*>(accumulator + parts.head),
                    reinterpret_cast<const GradPack*>(gradient + parts.head), parts.packs);
    // The last threads do the edges: in a small tensor the first ones are waiting for their packs.
    const int edge = kThreads - 1 - static_cast<int>(threadIdx.x);
    const int i = edge < parts.head ? edge : edge + parts.packs * kPackSize<Acc>;
    if (i < size) {
      accumulator[i] = Sum(overwrite_ ? kZero : accumulator[i], gradient[i]);
    }
  }

  // Does a chunk whose scale is 0: gradients are read where `check` asks, and not multiplied.
  __device__ void RunWithoutAdding(Acc* accumulator, const Grad* gradient, int size, bool check) {
    if (!overwrite_ && !check && !kNorms) return;
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) {
      if (overwrite_) accumulator[i] = 0;
      if (check || kNorms) {
        const Acc x = static_cast<Acc>(cuda::ToFloat(gradient[i]));
        Note(x, kNorms ? accumulator[i] : 0);
      }
    }
  }

  __device__ const Seen& seen() const { return seen_; }

 private:
  using AccPack = Pack<Acc, kPackSize<Acc>>;
  using GradPack = Pack<Grad, kPackSize<Acc>>;

  // Stands for an accumulator that is not read: -0 + x is x, while +0 + x loses the sign of -0.
  static constexpr Acc kZero = static_cast<Acc>(-0.0);

  __device__ void AccumulatePacks(AccPack* accumulator, const GradPack* gradient, int packs) {
    AccPack acc[kPacksPerThread];
    GradPack grad[kPacksPerThread];
#pragma unroll
    for (int k = 0; k < kPacksPerThread; ++k) {
      const int i = k * kThreads + static_cast<int>(threadIdx.x);
      if (i < packs) grad[k] = cuda::LoadPackOnce(gradient + i);
    }
#pragma unroll
    for (int k = 0; k < kPacksPerThread; ++k) {
      const int i = k * kThreads + static_cast<int>(threadIdx.x);
#pragma unroll
      for (Acc& value : acc[k].value) value = kZero;
      if (i < packs && !overwrite_) acc[k] = cuda::LoadPack(accumulator + i);
    }
#pragma unroll
    for (int k = 0; k < kPacksPerThread; ++k) {
      const int i = k * kThreads + static_cast<int>(threadIdx.x);
      if (i >= packs) continue;
#pragma unroll
      for (int j = 0; j < kPackSize<Acc>; ++j) {
        acc[k].value[j] = Sum(acc[k].value[j], grad[k].value[j]);
      }
      cuda::StorePack(accumulator + i, acc[k]);
    }
  }

  __device__ void AccumulateScalars(Acc* accumulator, const Grad* gradient, int size) {
    for (int first = static_cast<int>(threadIdx.x); first < size;
         first += kScalarsPerThread * kThreads) {
      Acc acc[kScalarsPerThread];
      Grad grad[kScalarsPerThread];
#pragma unroll
      for (int k = 0; k < kScalarsPerThread; ++k) {
        const int i = first + k * kThreads;
        if (i < size) grad[k] = gradient[i];
      }
#pragma unroll
      for (int k = 0; k < kScalarsPerThread; ++k) {
        const int i = first + k * kThreads;
        acc[k] = kZero;
        if (i < size && !overwrite_) acc[k] = accumulator[i];
      }
#pragma unroll
      for (int k = 0; k < kScalarsPerThread; ++k) {
        const int i = first + k * kThreads;
        if (i < size) accumulator[i] = Sum(acc[k], grad[k]);
      }
    }
  }

  // Checks every gradient, even where nobody asks: the kernel waits for memory anyway.
  __device__ Acc Sum(Acc acc, Grad grad) {
    const Acc x = static_cast<Acc>(cuda::ToFloat(grad));
    const Acc sum = cuda::Add(acc, cuda::Multiply(scale_, x));
    Note(x, sum);
    return sum;
  }

  __device__ void Note(Acc gradient, Acc accumulator) {
    seen_.finite = seen_.finite && cuda::IsFinite(gradient);
    if constexpr (kNorms) {
      const double g = gradient, a = accumulator;
      seen_.gradient = fma(g, g, seen_.gradient);
      seen_.accumulator = fma(a, a, seen_.accumulator);
    }
  }

  const Acc scale_;
  const bool overwrite_;
  Seen seen_;
};

template <typename Acc, typename Grad, bool kNorms>
__device__ Seen AccumulateChunk(void* accumulator, const void* gradient, std::int64_t size,
                                std::uint32_t chunk, double scale, bool overwrite, bool check) {
  const std::int64_t begin = static_cast<std::int64_t>(chunk) * kChunkSize<Acc>;
  const std::int64_t left = size - begin;
  const int length = static_cast<int>(left < kChunkSize<Acc> ? left : kChunkSize<Acc>);
  auto* to = static_cast<Acc*>(accumulator) + begin;
  const auto* from = static_cast<const Grad*>(gradient) + begin;
  const Acc factor = static_cast<Acc>(scale);
  ChunkAccumulator<Acc, Grad, kNorms> chunk_accumulator(factor, overwrite);
  if (factor == 0) {
    chunk_accumulator.RunWithoutAdding(to, from, length, check);
  } else {
    chunk_accumulator.Run(to, from, length);
  }
  return chunk_accumulator.seen();
}

template <bool kNorms, typename Params>
__global__ void __launch_bounds__(kThreads, kNorms ? 3 : 4)
    AccumulateKernel(ACCUMOPS_PARAMS(Params) params) {
  const bool overwrite = *params.overwrite;
  const double scale = cuda::ReadScale(params.scale);
  const int entry = cuda::FindEntry(params.first_chunk, params.count, blockIdx.x);
  const auto accumulate = [&](auto* function) {
    return function(params.accumulator[entry], params.gradient[entry], params.size[entry],
                    blockIdx.x - params.first_chunk[entry], scale, overwrite,
                    params.all_finite != nullptr);
  };
  Seen seen;
  switch (params.kind[entry]) {
    case Kind(DType::kFloat32, DType::kFloat32):
      seen = accumulate(AccumulateChunk<float, float, kNorms>);
      break;
    case Kind(DType::kFloat32, DType::kFloat16):
      seen = accumulate(AccumulateChunk<float, cuda::Float16, kNorms>);
      break;
    case Kind(DType::kFloat32, DType::kBFloat16):
      seen = accumulate(AccumulateChunk<float, cuda::BFloat16, kNorms>);
      break;
    case Kind(DType::kFloat64, DType::kFloat64):
      seen = accumulate(AccumulateChunk<double, double, kNorms>);
      break;
    case Kind(DType::kFloat64, DType::kFloat32):
      seen = accumulate(AccumulateChunk<double, float, kNorms>);
      break;
    case Kind(DType::kFloat64, DType::kFloat16):
      seen = accumulate(AccumulateChunk<double, cuda::Float16, kNorms>);
      break;
    case Kind(DType::kFloat64, DType::kBFloat16):
      seen = accumulate(AccumulateChunk<double, cuda::BFloat16, kNorms>);
      break;
  }
  if (!seen.finite && params.all_finite != nullptr) {
    cuda::SetFromAnyThread(params.all_finite, false);
  }
  if constexpr (kNorms) {
    const double gradient = cuda::SumOfBlock<kThreads>(seen.gradient);
    __syncthreads();
    const double accumulator = cuda::SumOfBlock<kThreads>(seen.accumulator);
    if (threadIdx.x == 0) {
      params.chunk_norms[blockIdx.x] = gradient;
      params.chunk_norms[params.accumulator_norms + blockIdx.x] = accumulator;
    }
  }
}

std::int64_t ChunkSize(const AccumulateItem& item) {
  return kChunkBytes / static_cast<std::int64_t>(SizeOf(item.accumulator_dtype));
}

std::int64_t ChunksOf(const AccumulateItem& item) {
  return cuda::ChunksOf(item.size, ChunkSize(item));
}

std::int64_t ChunksOfAll(const AccumulateItem* items, std::size_t count) {
  std::int64_t chunks = 0;
  for (std::size_t i = 0; i < count; ++i) chunks += ChunksOf(items[i]);
  return chunks;
}

template <bool kNorms, typename Params>
cudaError_t LaunchTables(const AccumulateItem* items, std::size_t count, DeviceScalar scale,
                         const bool* overwrite, bool* all_finite, double* chunk_norms,
                         cudaStream_t stream) {
  Params params;
  params.scale = scale;
  params.overwrite = overwrite;
  params.all_finite = all_finite;
  params.chunk_norms = chunk_norms;
  params.accumulator_norms = kNorms ? ChunksOfAll(items, count) : 0;
  return cuda::ForEachTable(
      count, Params::kCapacity, [&](std::size_t i) { return ChunksOf(items[i]); },
      [&](std::size_t i, const cuda::TablePart& part) {
        const AccumulateItem& item = items[i];
        const std::int64_t begin = part.begin * ChunkSize(item);
        const std::int64_t end = begin + part.chunks * ChunkSize(item);
        const std::size_t acc_bytes = SizeOf(item.accumulator_dtype);
        const std::size_t grad_bytes = SizeOf(item.gradient_dtype);
        const int entry = part.entry;
        params.accumulator[entry] = static_cast<char*>(item.accumulator) + begin * acc_bytes;
        params.gradient[entry] = static_cast<const char*>(item.gradient) + begin * grad_bytes;
        params.size[entry] = (end < item.size ? end : item.size) - begin;
        params.first_chunk[entry] = static_cast<std::uint32_t>(part.first_chunk);
        params.kind[entry] = Kind(item.accumulator_dtype, item.gradient_dtype);
      },
      [&](int entries, std::int64_t chunks) {
        params.count = entries;
        const cudaError_t error =
            cuda::Launch(AccumulateKernel<kNorms, Params>, chunks, kThreads, params, stream);
        params.chunk_norms += kNorms ? chunks : 0;
        return error;
      });
}

template <bool kNorms>
cudaError_t LaunchAccumulate(const AccumulateItem* items, std::size_t count, DeviceScalar scale,
                             const bool* overwrite, bool* all_finite, double* chunk_norms,
                             cudaStream_t stream) {
  const auto launch = cuda::ChooseTable<SmallParams, LargeParams>(
      count, LaunchTables<kNorms, SmallParams>,
      count > MediumParams::kCapacity ? LaunchTables<kNorms, LargeParams>
                                      : LaunchTables<kNorms, MediumParams>);
  return launch(items, count, scale, overwrite, all_finite, chunk_norms, stream);
}

}  // namespace

std::size_t AccumulateNormsWorkspace(const AccumulateItem* items, std::size_t count) {
  return 2 * static_cast<std::size_t>(ChunksOfAll(items, count)) * sizeof(double);
}

const char* AccumulateCuda(const AccumulateItem* items, std::size_t count, DeviceScalar scale,
                           const bool* overwrite, const AccumulateReport& report, void* workspace,
                           CUstream_st* stream) {
  if (items == nullptr || count == 0) return nullptr;
  if (report.squared_norms == nullptr) {
    return cuda::ErrorText(LaunchAccumulate<false>(items, count, scale, overwrite,
                                                   report.all_finite, nullptr, stream));
  }
  auto* chunk_norms = static_cast<double*>(workspace);
  cudaError_t error = LaunchAccumulate<true>(items, count, scale, overwrite, report.all_finite,
                                             chunk_norms, stream);
  if (error == cudaSuccess) {
    // The accumulators' chunks follow those of the gradients, and so do their sums.
    error = cuda::SumChunks(
        2 * count, [&](std::size_t i) { return ChunksOf(items[i % count]); }, report.squared_norms,
        chunk_norms, stream);
  }
  return cuda::ErrorText(error);
}

}  // namespace accumops
