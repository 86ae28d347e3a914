// One pass over all that a step reads and writes. Tables and chunks are as in accumulate_cuda.cu;
// beyond that:
//
// - A thread holds its share of a chunk in registers, so that all loads are in flight together. So
//   rules with more slots take fewer values.
// - The types of the latest gradients are branches of one kernel, the same for all of a block. A
//   kernel for each would be four times the code.
// - Where rows have flags, a thread first collects the flags of its share of a larger chunk, then
//   updates the touched rows: an untouched row costs its flag and no more.
// - Packs are 16 bytes where a whole tensor is aligned, and single values where it is not, as in
//   the last chunk of a tensor that packs do not divide.
#include "cuda_common.cuh"
#include "tensor_table.cuh"
#include "update.h"
#include "update_rate.h"

namespace accumops {
namespace {

using cuda::Pack;

constexpr int kThreads = 256;
constexpr int kFullPack = cuda::kPackSize<float>;
constexpr int kFlagSteps = 16;  // packs, full or single, whose flags a thread collects at once

// Step() is a rule's step for one value: x is the value after its decay, g its gradient, and
// `slots` are its m, v and w. kValues is how many values of each array a thread holds, kBlocks how
// many blocks share a processor.
struct Sgd {
  static constexpr int kSlots = 0;
  static constexpr int kValues = 12;
  static constexpr int kBlocks = 3;
  static __device__ float Step(float x, float g, float*, float rate, const UpdateSettings&) {
    return cuda::Subtract(x, cuda::Multiply(rate, g));
  }
};

template <bool kNesterov>
struct Momentum {
  static constexpr int kSlots = 1;
  static constexpr int kValues = 8;
  static constexpr int kBlocks = 4;
  static __device__ float Step(float x, float g, float* slots, float rate,
                               const UpdateSettings& settings) {
    const float step = cuda::Multiply(rate, g);
    const float m = cuda::Subtract(cuda::Multiply(slots[0], settings.beta_1), step);
    slots[0] = m;
    if (!kNesterov) return cuda::Add(x, m);
    return cuda::Add(x, cuda::Subtract(cuda::Multiply(m, settings.beta_1), step));
  }
};

template <bool kAmsgrad>
struct Adam {
  static constexpr int kSlots = kAmsgrad ? 3 : 2;
  static constexpr int kValues = kAmsgrad ? 4 : 8;
  static constexpr int kBlocks = kAmsgrad ? 4 : 3;
  static __device__ float Step(float x, float g, float* slots, float rate,
                               const UpdateSettings& settings) {
    const float m =
        cuda::Add(slots[0], cuda::Multiply(cuda::Subtract(g, slots[0]), settings.new_1));
    const float square = cuda::Multiply(g, g);
    const float v =
        cuda::Add(slots[1], cuda::Multiply(cuda::Subtract(square, slots[1]), settings.new_2));
    slots[0] = m;
    slots[1] = v;
    float under = v;
    if (kAmsgrad) {
      const float w = slots[2];
      under = w > v || w != w ? w : v;  // fmaxf would drop NaN
      slots[2] = under;
    }
    return cuda::Subtract(
        x, __fdiv_rn(cuda::Multiply(m, rate), cuda::Add(__fsqrt_rn(under), settings.epsilon)));
  }
};

struct Lion {
  static constexpr int kSlots = 1;
  static constexpr int kValues = 8;
  static constexpr int kBlocks = 4;
  static __device__ float Step(float x, float g, float* slots, float rate,
                               const UpdateSettings& settings) {
    const float m = slots[0];
    const float direction =
        cuda::Add(cuda::Multiply(m, settings.beta_1), cuda::Multiply(g, settings.new_1));
    const float below = direction < 0 ? -1.0f : direction;
    const float sign = direction > 0 ? 1.0f : below;
    slots[0] = cuda::Add(cuda::Multiply(m, settings.beta_2), cuda::Multiply(g, settings.new_2));
    return cuda::Subtract(x, cuda::Multiply(rate, sign));
  }
};

// Whether all of an item can be read in packs that lie within rows.
template <typename Rule>
__host__ __device__ bool IsPacked(const UpdateItem& item) {
  auto address = reinterpret_cast<std::uintptr_t>(item.value) |
                 reinterpret_cast<std::uintptr_t>(item.accumulator);
  for (int s = 0; s < Rule::kSlots; ++s) {
    address |= reinterpret_cast<std::uintptr_t>(item.slots[s]);
  }
  const auto latest = reinterpret_cast<std::uintptr_t>(item.latest);
  const bool rows_fit = item.touched_rows == nullptr ||
                        (item.row_size % kFullPack == 0 && item.size % kFullPack == 0);
  return rows_fit && address % cuda::kVectorBytes == 0 &&
         (latest & (kFullPack * SizeOf(item.latest_dtype) - 1)) == 0;
}

// How many values a chunk has.
template <typename Rule>
__host__ __device__ int ChunkSize(const UpdateItem& item, bool packed) {
  if (item.touched_rows == nullptr) return kThreads * Rule::kValues;
  return kThreads * kFlagSteps * (packed ? kFullPack : 1);
}

template <int kTableCapacity>
struct UpdateParams {
  static constexpr int kCapacity = kTableCapacity;

  UpdateItem item[kCapacity];
  // Ascending; chunks are counted through the table. Negative where an earlier grid began the item.
  std::int64_t first_chunk[kCapacity];
  std::uint32_t index[kCapacity];  // in the list, for its scale
  UpdateSettings settings;
  UpdateScalars scalars;
  int count;
};

constexpr int kSmallCapacity = 43;
using SmallParams = UpdateParams<kSmallCapacity>;
using LargeParams = UpdateParams<cuda::LargeCapacity(352, kSmallCapacity)>;

struct Factors {
  float scale;
  float weight;
  float rate;
  float decay;
  bool overwrite;
};

// Gradients of any type as they are in memory. Widening them right after a load would wait for it.
template <int kPack>
using RawPack = Pack<unsigned, kPack>;

template <int kPack>
__device__ RawPack<kPack> LoadRaw(const void* from, DType dtype, int i) {
  if (dtype == DType::kFloat32) {
    return cuda::LoadPackOnce(static_cast<const RawPack<kPack>*>(from) + i);
  }
  RawPack<kPack> result = {};
  if constexpr (kPack == 1) {
    result.value[0] = __ldcs(static_cast<const unsigned short*>(from) + i);
  } else {
    const auto half = cuda::LoadPackOnce(static_cast<const RawPack<kPack / 2>*>(from) + i);
#pragma unroll
    for (int j = 0; j < kPack / 2; ++j) result.value[j] = half.value[j];
  }
  return result;
}

template <int kPack>
__device__ float Widen(const RawPack<kPack>& raw, DType dtype, int j) {
  if (dtype == DType::kFloat32) return __uint_as_float(raw.value[j]);
  const auto bits = static_cast<std::uint16_t>(raw.value[j / 2] >> (j % 2 * 16));
  return dtype == DType::kFloat16 ? cuda::ToFloat(cuda::Float16{bits})
                                  : cuda::ToFloat(cuda::BFloat16{bits});
}

// Does one chunk: the values of an item from `begin` on.
template <typename Rule, int kPack>
class ChunkUpdater {
 public:
  __device__ ChunkUpdater(const UpdateItem& item, std::int64_t begin, const Factors& factors,
                          const UpdateSettings& settings)
      : item_(item),
        factors_(factors),
        settings_(settings),
        begin_(begin),
        value_(reinterpret_cast<FloatPack*>(item.value + begin)) {
#pragma unroll
    for (int s = 0; s < Rule::kSlots; ++s) {
      slots_[s] = reinterpret_cast<FloatPack*>(item.slots[s] + begin);
    }
  }

  __device__ void Run(int size) const {
    const int packs = size / kPack;
    unsigned wanted = item_.touched_rows == nullptr ? Existing(packs) : Touched(packs);
    int first = static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (; wanted != 0; wanted >>= kSteps) {
      if (wanted % (1u << kSteps) != 0) Update(first, wanted);
      first += kSteps * kThreads;
    }
  }

 private:
  using FloatPack = Pack<float, kPack>;
  static constexpr int kShare = Rule::kValues / kPack;    // packs of this thread, without flags
  static constexpr int kSteps = kPack == 1 ? 4 : kShare;  // packs that it holds at once

  // A bit for each pack of this thread, up to the chunk's end.
  static __device__ unsigned Existing(int packs) {
    unsigned result = 0;
#pragma unroll
    for (int k = 0; k < kShare; ++k) {
      if (k * kThreads + static_cast<int>(threadIdx.x) < packs) result |= 1u << k;
    }
    return result;
  }

  // Loads all flags before it looks at the first, and finds them with only two divisions.
  __device__ unsigned Touched(int packs) const {
    constexpr int kStep = kThreads * kPack;
    constexpr std::int64_t kFar = 1 << 30;  // beyond every chunk
    const int thread = static_cast<int>(threadIdx.x);
    const std::int64_t first = begin_ + thread * kPack;
    const std::int64_t first_row = first / item_.row_size;
    const std::int64_t to_next = (first_row + 1) * item_.row_size - first;
    const bool* row = item_.touched_rows + first_row;
    int left = static_cast<int>(to_next < kFar ? to_next : kFar);  // of the row
    const int row_size = static_cast<int>(item_.row_size < kFar ? item_.row_size : kFar);
    const int step_rows = kStep / row_size;
    const int step_rest = kStep % row_size;
    bool flag[kFlagSteps];
#pragma unroll
    for (int k = 0; k < kFlagSteps; ++k) {
      flag[k] = false;
      if (k * kThreads + thread < packs) flag[k] = *row;
      row += step_rows;
      left -= step_rest;
      if (left <= 0) {
        left += row_size;
        ++row;
      }
    }
    unsigned result = 0;
#pragma unroll
    for (int k = 0; k < kFlagSteps; ++k) result |= (flag[k] ? 1u : 0u) << k;
    return result;
  }

  // Bit k of `wanted` is for the pack at first + k * kThreads. The accumulator is read last: the
  // others need not wait for `overwrite` to arrive.
  __device__ void Update(int first, unsigned wanted) const {
    FloatPack value[kSteps];
    FloatPack slots[kMaxSlots][kSteps];
    FloatPack sum[kSteps];
    RawPack<kPack> latest[kSteps];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (!(wanted >> k & 1)) continue;
      value[k] = cuda::LoadPack(value_ + first + k * kThreads);
#pragma unroll
      for (int s = 0; s < Rule::kSlots; ++s) {
        slots[s][k] = cuda::LoadPack(slots_[s] + first + k * kThreads);
      }
    }
    const DType dtype = item_.latest_dtype;
    const bool has_latest = item_.latest != nullptr && factors_.weight != 0;
    if (has_latest) {
      const void* from = static_cast<const char*>(item_.latest) +
                         begin_ * static_cast<std::int64_t>(SizeOf(dtype));
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (wanted >> k & 1) latest[k] = LoadRaw<kPack>(from, dtype, first + k * kThreads);
      }
    }
    // Stands for an accumulator that is not read: -0 + x is x, while +0 + x loses the sign of -0.
    const float zero = has_latest ? -0.0f : 0.0f;
    const bool counts = item_.accumulator != nullptr && !factors_.overwrite;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (float& x : sum[k].value) x = zero;
    }
    if (counts) {
      const auto* from = reinterpret_cast<const FloatPack*>(item_.accumulator + begin_);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (wanted >> k & 1) sum[k] = cuda::LoadPackOnce(from + first + k * kThreads);
      }
    }
    if (has_latest) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          const float x = Widen<kPack>(latest[k], dtype, j);
          sum[k].value[j] = cuda::Add(sum[k].value[j], cuda::Multiply(factors_.weight, x));
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (!(wanted >> k & 1)) continue;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        float of_value[kMaxSlots];
#pragma unroll
        for (int s = 0; s < Rule::kSlots; ++s) of_value[s] = slots[s][k].value[j];
        value[k].value[j] = Step(value[k].value[j], sum[k].value[j], of_value);
#pragma unroll
        for (int s = 0; s < Rule::kSlots; ++s) slots[s][k].value[j] = of_value[s];
      }
      cuda::StorePack(value_ + first + k * kThreads, value[k]);
#pragma unroll
      for (int s = 0; s < Rule::kSlots; ++s) {
        cuda::StorePack(slots_[s] + first + k * kThreads, slots[s][k]);
      }
    }
  }

  __device__ float Step(float value, float sum, float* slots) const {
    float g = cuda::Multiply(factors_.scale, sum);
    const float clip = settings_.clip;
    if (clip != 0) {
      // fminf and fmaxf would drop NaN.
      g = g > clip ? clip : g;
      g = g < -clip ? -clip : g;
    }
    if (item_.decays) value = cuda::Subtract(value, cuda::Multiply(value, factors_.decay));
    return Rule::Step(value, g, slots, factors_.rate, settings_);
  }

  const UpdateItem& item_;
  const Factors& factors_;
  const UpdateSettings& settings_;
  const std::int64_t begin_;
  FloatPack* const value_;
  FloatPack* slots_[kMaxSlots];
};

template <typename Rule, typename Params>
__global__ void __launch_bounds__(kThreads, Rule::kBlocks)
    UpdateKernel(ACCUMOPS_PARAMS(Params) params) {
  const UpdateScalars& scalars = params.scalars;
  if (!*scalars.applies) return;  // all threads of all blocks alike
  const std::int64_t block = blockIdx.x;
  const int entry = cuda::FindEntry(params.first_chunk, params.count, block);
  const UpdateItem& item = params.item[entry];
  const Factors factors = {scalars.scales[scalars.scale_for_each ? params.index[entry] : 0],
                           *scalars.weight, *scalars.rate, *scalars.decay, *scalars.overwrite};
  const bool packed = IsPacked<Rule>(item);
  const int chunk_size = ChunkSize<Rule>(item, packed);
  const std::int64_t begin = (block - params.first_chunk[entry]) * chunk_size;
  const std::int64_t left = item.size - begin;
  const int size = left < chunk_size ? static_cast<int>(left) : chunk_size;
  if (packed && size % kFullPack == 0) {
    ChunkUpdater<Rule, kFullPack>(item, begin, factors, params.settings).Run(size);
  } else {
    ChunkUpdater<Rule, 1>(item, begin, factors, params.settings).Run(size);
  }
}

template <typename Rule, typename Params>
cudaError_t LaunchTables(const UpdateItem* items, std::size_t count, const UpdateSettings& settings,
                         const UpdateScalars& scalars, cudaStream_t stream) {
  Params params;
  params.settings = settings;
  params.scalars = scalars;
  return cuda::ForEachTable(
      count, Params::kCapacity,
      [&](std::size_t i) {
        const UpdateItem& item = items[i];
        return cuda::ChunksOf(item.size, ChunkSize<Rule>(item, IsPacked<Rule>(item)));
      },
      [&](std::size_t i, const cuda::TablePart& part) {
        params.item[part.entry] = items[i];
        params.first_chunk[part.entry] = part.first_chunk - part.begin;
        params.index[part.entry] = static_cast<std::uint32_t>(i);
      },
      [&](int entries, std::int64_t chunks) {
        params.count = entries;
        return cuda::Launch(UpdateKernel<Rule, Params>, chunks, kThreads, params, stream);
      });
}

template <typename Rule>
cudaError_t LaunchRule(const UpdateItem* items, std::size_t count, const UpdateSettings& settings,
                       const UpdateScalars& scalars, cudaStream_t stream) {
  static_assert(Rule::kSlots <= kMaxSlots, "too many slots");
  const auto launch = cuda::ChooseTable<SmallParams, LargeParams>(
      count, LaunchTables<Rule, SmallParams>, LaunchTables<Rule, LargeParams>);
  return launch(items, count, settings, scalars, stream);
}

struct RateParams {
  UpdateSettings settings;
  UpdateScalars scalars;
};

// One thread: every block of an update would repeat the powers.
__global__ void RateKernel(ACCUMOPS_PARAMS(RateParams) params) {
  const UpdateScalars& scalars = params.scalars;
  const float bias_1 = BiasOf(params.settings.beta_1, *scalars.iterations);
  const float bias_2 = BiasOf(params.settings.beta_2, *scalars.iterations);
  *scalars.corrected_rate = __fdiv_rn(cuda::Multiply(*scalars.rate, __fsqrt_rn(bias_2)), bias_1);
}

cudaError_t LaunchUpdate(const UpdateItem* items, std::size_t count, const UpdateSettings& settings,
                         const UpdateScalars& given, cudaStream_t stream) {
  UpdateScalars scalars = given;
  if (given.iterations != nullptr) {
    const RateParams params = {settings, given};
    const cudaError_t error = cuda::Launch(RateKernel, 1, 1, params, stream);
    if (error != cudaSuccess) return error;
    scalars.rate = given.corrected_rate;
  }
  switch (settings.rule) {
    case UpdateRule::kSgd:
      return LaunchRule<Sgd>(items, count, settings, scalars, stream);
    case UpdateRule::kMomentum:
      return LaunchRule<Momentum<false>>(items, count, settings, scalars, stream);
    case UpdateRule::kNesterov:
      return LaunchRule<Momentum<true>>(items, count, settings, scalars, stream);
    case UpdateRule::kAdam:
      return LaunchRule<Adam<false>>(items, count, settings, scalars, stream);
    case UpdateRule::kAmsgrad:
      return LaunchRule<Adam<true>>(items, count, settings, scalars, stream);
    case UpdateRule::kLion:
      return LaunchRule<Lion>(items, count, settings, scalars, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

const char* UpdateCuda(const UpdateItem* items, std::size_t count, const UpdateSettings& settings,
                       const UpdateScalars& scalars, CUstream_st* stream) {
  if (items == nullptr || count == 0) return nullptr;
  return cuda::ErrorText(LaunchUpdate(items, count, settings, scalars, stream));
}

}  // namespace accumops
