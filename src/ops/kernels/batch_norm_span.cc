// Compiled once for each instruction set, with ACCUMOPS_INSTRUCTION_SET naming the namespace. All
// of them use vectors of 64 bytes, so that they add in the same order: see lanes.h.
#include "batch_norm_span.h"

#include <type_traits>

#include "elements.h"
#include "lanes.h"

namespace accumops {
namespace ACCUMOPS_INSTRUCTION_SET {
namespace {

using FloatLanes = Vector<float, 64>;
using DoubleLanes = Vector<double, 64>;

// The type of a data type's statistics, and a vector of it.
template <typename T>
struct Wide {
  using Value = float;
  using Lanes = FloatLanes;
};
template <>
struct Wide<double> {
  using Value = double;
  using Lanes = DoubleLanes;
};
template <typename T>
using Value = typename Wide<T>::Value;
template <typename T>
using Lanes = typename Wide<T>::Lanes;
template <typename T>
constexpr std::int64_t kLanes = sizeof(Lanes<T>) / sizeof(Value<T>);

template <typename T>
Lanes<T> Load(const T* from) {
  return LoadWide<Lanes<T>>(from);
}

template <bool kStreaming, typename T>
void Store(T* to, Lanes<T> lanes) {
  StoreNarrow<kStreaming>(to, lanes);
}

void Store(float* p, float value) { *p = value; }
void Store(double* p, double value) { *p = value; }
void Store(BFloat16* p, float value) { *p = Narrow<BFloat16>(value); }
void Store(Float16* p, float value) { *p = Narrow<Float16>(value); }

// The processor's own prefetcher stops at each 4 KiB page; TensorFlow's memory has no larger ones.
constexpr std::int64_t kAheadBytes = 2048;
template <typename T>
constexpr std::int64_t kAhead = kAheadBytes / static_cast<std::int64_t>(sizeof(T));

// How far ahead it pays to fetch down a chunk's columns, in elements. Narrow rows are read as one
// array; in wide rows the same columns are fetched, some rows later.
template <typename T>
std::int64_t RowsAhead(std::int64_t stride) {
  const auto size = static_cast<std::int64_t>(sizeof(T));
  return 4 * stride + (stride * size < kAheadBytes ? kAhead<T> : 0);
}

// The order in which the results of a block are made. A block without gaps is gone through as it
// lies in memory. Parts of longer rows are gone through from the last row, which was read last and
// is in the cache, to the first, and some rows are fetched ahead.
struct Walk {
  std::int64_t first;  // row
  std::int64_t step;   // 1 or -1 rows
  std::int64_t ahead;  // elements
};

template <typename T>
Walk WalkThrough(const BatchNormBlock& block) {
  const auto size = static_cast<std::int64_t>(sizeof(T));
  if (block.columns == block.stride) return {0, 1, kAhead<T>};
  const std::int64_t bytes = block.columns * size;
  return {block.rows - 1, -1, -(kAheadBytes + bytes - 1) / bytes * block.stride};
}

template <typename T>
void Prefetch(const T* p, std::int64_t ahead) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + ahead * std::int64_t{sizeof(T)});
}

// A chunk is so many rows, whose sums are kept in the data's precision before they are added up in
// double, of so many vectors, whose sums stay in registers. It is read twice, from the L1 cache.
constexpr std::int64_t kChunkRows = 128;
constexpr std::int64_t kVectors = 4;

// Merges a chunk's moments into the moments of its columns. `middle` is the chunk's mean in the
// precision of its values; `first` and `second` are sums about it, of distances and of their
// squares. `first`, zero but for rounding, is what the mean lacks.
template <typename V>
void Merge(const V* middle, const V* first, const V* second, std::int64_t columns, double size,
           double count, double* mean, double* centred) {
  const double share = size / (count + size);
  const double one = 1 / size;
  for (std::int64_t c = 0; c < columns; ++c) {
    const double rest = static_cast<double>(first[c]) * one;
    const double delta = static_cast<double>(middle[c]) + rest - mean[c];
    centred[c] += static_cast<double>(second[c]) - rest * static_cast<double>(first[c]) +
                  delta * delta * (count * share);
    mean[c] += delta * share;
  }
}

template <std::int64_t kCount, typename T>
void ChunkColumns(const T* x, std::int64_t rows, std::int64_t stride, const bool* mask, double size,
                  double count, double* mean, double* centred) {
  Lanes<T> sum[kCount] = {}, first[kCount] = {}, second[kCount] = {}, middle[kCount];
  const std::int64_t ahead = RowsAhead<T>(stride);
  for (std::int64_t r = 0; r < rows; ++r) {
    if (mask != nullptr && !mask[r]) continue;
    const T* row = x + r * stride;
    for (std::int64_t k = 0; k < kCount; ++k) {
      Prefetch(row + k * kLanes<T>, ahead);
      sum[k] += Load(row + k * kLanes<T>);
    }
  }
  for (std::int64_t k = 0; k < kCount; ++k) middle[k] = sum[k] / static_cast<Value<T>>(size);
  for (std::int64_t r = 0; r < rows; ++r) {
    if (mask != nullptr && !mask[r]) continue;
    const T* row = x + r * stride;
    for (std::int64_t k = 0; k < kCount; ++k) {
      const Lanes<T> distance = Load(row + k * kLanes<T>) - middle[k];
      first[k] += distance;
      second[k] += distance * distance;
    }
  }
  constexpr std::int64_t kColumns = kCount * kLanes<T>;
  Value<T> columns[3][kColumns];
  __builtin_memcpy(columns[0], middle, sizeof middle);
  __builtin_memcpy(columns[1], first, sizeof first);
  __builtin_memcpy(columns[2], second, sizeof second);
  Merge(columns[0], columns[1], columns[2], kColumns, size, count, mean, centred);
}

template <typename T>
void ChunkColumn(const T* x, std::int64_t rows, std::int64_t stride, const bool* mask, double size,
                 double count, double* mean, double* centred) {
  Value<T> middle = 0, first = 0, second = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    if (mask == nullptr || mask[r]) middle += Widen(x[r * stride]);
  }
  middle /= static_cast<Value<T>>(size);
  for (std::int64_t r = 0; r < rows; ++r) {
    if (mask != nullptr && !mask[r]) continue;
    const Value<T> distance = Widen(x[r * stride]) - middle;
    first += distance;
    second += distance * distance;
  }
  Merge(&middle, &first, &second, 1, size, count, mean, centred);
}

template <typename T>
void MomentsTyped(const BatchNormBlock& block, const T* x, const bool* mask, double* count,
                  double* mean, double* centred) {
  for (std::int64_t begin = 0; begin < block.rows; begin += kChunkRows) {
    const std::int64_t left = block.rows - begin;
    const std::int64_t rows = left < kChunkRows ? left : kChunkRows;
    const T* chunk = x + begin * block.stride;
    const bool* chunk_mask = mask == nullptr ? nullptr : mask + begin;
    std::int64_t valid = rows;
    if (mask != nullptr) {
      valid = 0;
      for (std::int64_t r = 0; r < rows; ++r) valid += chunk_mask[r];
    }
    if (valid == 0) continue;
    const auto size = static_cast<double>(valid);
    std::int64_t c = 0;
    for (; c + kVectors * kLanes<T> <= block.columns; c += kVectors * kLanes<T>) {
      ChunkColumns<kVectors>(chunk + c, rows, block.stride, chunk_mask, size, *count, mean + c,
                             centred + c);
    }
    for (; c + kLanes<T> <= block.columns; c += kLanes<T>) {
      ChunkColumns<1>(chunk + c, rows, block.stride, chunk_mask, size, *count, mean + c,
                      centred + c);
    }
    for (; c < block.columns; ++c) {
      ChunkColumn(chunk + c, rows, block.stride, chunk_mask, size, *count, mean + c, centred + c);
    }
    *count += size;
  }
}

// Goes through a run of one channel's values: first vectors, kVectors of them side by side, and
// then the values that do not fill one. vector_step(i, k) takes the vector at i, to add to sum k;
// scalar_step(i) takes the value at i.
template <typename T, typename VectorStep, typename ScalarStep>
void OverRun(std::int64_t size, const VectorStep& vector_step, const ScalarStep& scalar_step) {
  std::int64_t i = 0;
  for (; i + kVectors * kLanes<T> <= size; i += kVectors * kLanes<T>) {
    for (std::int64_t k = 0; k < kVectors; ++k) vector_step(i + k * kLanes<T>, k);
  }
  for (; i + kLanes<T> <= size; i += kLanes<T>) vector_step(i, 0);
  for (; i < size; ++i) scalar_step(i);
}

// The sum of all vectors' lanes and the rest of the run, added in a fixed order.
template <typename T>
double Total(const Lanes<T>* sums, double rest) {
  double total = rest;
  for (std::int64_t k = 0; k < kVectors; ++k) {
    for (std::int64_t i = 0; i < kLanes<T>; ++i) total += static_cast<double>(sums[k][i]);
  }
  return total;
}

constexpr std::int64_t kRun = 8192;  // values, that stay in the L1 cache

// Calls body(offset, size) for the runs of a block.
template <typename Body>
void ForEachRun(const BatchNormBlock& block, const Body& body) {
  for (std::int64_t r = 0; r < block.rows; ++r) {
    for (std::int64_t begin = 0; begin < block.columns; begin += kRun) {
      const std::int64_t left = block.columns - begin;
      body(r * block.stride + begin, left < kRun ? left : kRun);
    }
  }
}

template <typename T>
void UniformMomentsTyped(const BatchNormBlock& block, const T* x, double* count, double* mean,
                         double* centred) {
  using V = Value<T>;
  ForEachRun(block, [&](std::int64_t offset, std::int64_t length) {
    const T* run = x + offset;
    const auto size = static_cast<double>(length);
    Lanes<T> sums[kVectors] = {};
    V rest = 0;
    OverRun<T>(
        length,
        [&](std::int64_t i, std::int64_t k) {
          Prefetch(run + i, kAhead<T>);
          sums[k] += Load(run + i);
        },
        [&](std::int64_t i) { rest += Widen(run[i]); });
    const auto middle = static_cast<V>(Total<T>(sums, static_cast<double>(rest)) / size);
    Lanes<T> first[kVectors] = {}, second[kVectors] = {};
    V first_rest = 0, second_rest = 0;
    OverRun<T>(
        length,
        [&](std::int64_t i, std::int64_t k) {
          const Lanes<T> distance = Load(run + i) - middle;
          first[k] += distance;
          second[k] += distance * distance;
        },
        [&](std::int64_t i) {
          const V distance = Widen(run[i]) - middle;
          first_rest += distance;
          second_rest += distance * distance;
        });
    const double run_moments[] = {static_cast<double>(middle),
                                  Total<T>(first, static_cast<double>(first_rest)),
                                  Total<T>(second, static_cast<double>(second_rest))};
    Merge(run_moments, run_moments + 1, run_moments + 2, 1, size, *count, mean, centred);
    *count += size;
  });
}

// One of the factors' arrays, for a vector of columns or for a single one.
template <bool kUniform, typename T>
class Factor {
 public:
  explicit Factor(const void* values) : values_(static_cast<const Value<T>*>(values)) {}
  Lanes<T> At(std::int64_t c) const {
    return kUniform ? Lanes<T>{} + values_[0] : LoadAs<Lanes<T>>(values_ + c);
  }
  Value<T> One(std::int64_t c) const { return values_[kUniform ? 0 : c]; }

 private:
  const Value<T>* values_;
};

template <bool kUniform, bool kStreaming, typename T>
void NormalizeTyped(const BatchNormBlock& block, const T* x, T* y,
                    const BatchNormFactors& factors) {
  const Factor<kUniform, T> shift(factors.shift), scale(factors.scale), offset(factors.offset);
  const Walk walk = WalkThrough<T>(block);
  for (std::int64_t i = 0; i < block.rows; ++i) {
    const std::int64_t r = walk.first + i * walk.step;
    const T* from = x + r * block.stride;
    T* to = y + r * block.stride;
    std::int64_t c = 0;
    for (; c + kLanes<T> <= block.columns; c += kLanes<T>) {
      Prefetch(from + c, walk.ahead);
      Store<kStreaming>(to + c, (Load(from + c) - shift.At(c)) * scale.At(c) + offset.At(c));
    }
    for (; c < block.columns; ++c) {
      Store(to + c, (Widen(from[c]) - shift.One(c)) * scale.One(c) + offset.One(c));
    }
  }
  if (kStreaming) FinishStreaming();
}

template <std::int64_t kCount, typename T>
void ChunkGradientColumns(const T* x, const T* dy, std::int64_t rows, std::int64_t stride,
                          const Value<T>* shift, double* sum_dy, double* sum_product) {
  Lanes<T> sums[kCount] = {}, products[kCount] = {}, middle[kCount];
  for (std::int64_t k = 0; k < kCount; ++k) {
    middle[k] = LoadAs<Lanes<T>>(shift + k * kLanes<T>);
  }
  const std::int64_t ahead = RowsAhead<T>(stride);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t k = 0; k < kCount; ++k) {
      const std::int64_t i = r * stride + k * kLanes<T>;
      Prefetch(x + i, ahead);
      Prefetch(dy + i, ahead);
      const Lanes<T> gradient = Load(dy + i);
      sums[k] += gradient;
      products[k] += gradient * (Load(x + i) - middle[k]);
    }
  }
  constexpr std::int64_t kColumns = kCount * kLanes<T>;
  Value<T> columns[2][kColumns];
  __builtin_memcpy(columns[0], sums, sizeof sums);
  __builtin_memcpy(columns[1], products, sizeof products);
  for (std::int64_t c = 0; c < kColumns; ++c) {
    sum_dy[c] += static_cast<double>(columns[0][c]);
    sum_product[c] += static_cast<double>(columns[1][c]);
  }
}

template <typename T>
void GradientSumsTyped(const BatchNormBlock& block, const T* x, const T* dy,
                       const BatchNormFactors& factors, double* sum_dy, double* sum_product) {
  const auto* shift = static_cast<const Value<T>*>(factors.shift);
  for (std::int64_t begin = 0; begin < block.rows; begin += kChunkRows) {
    const std::int64_t left = block.rows - begin;
    const std::int64_t rows = left < kChunkRows ? left : kChunkRows;
    const T* xs = x + begin * block.stride;
    const T* dys = dy + begin * block.stride;
    std::int64_t c = 0;
    for (; c + kVectors * kLanes<T> <= block.columns; c += kVectors * kLanes<T>) {
      ChunkGradientColumns<kVectors>(xs + c, dys + c, rows, block.stride, shift + c, sum_dy + c,
                                     sum_product + c);
    }
    for (; c + kLanes<T> <= block.columns; c += kLanes<T>) {
      ChunkGradientColumns<1>(xs + c, dys + c, rows, block.stride, shift + c, sum_dy + c,
                              sum_product + c);
    }
    for (; c < block.columns; ++c) {
      Value<T> sum = 0, product = 0;
      for (std::int64_t r = 0; r < rows; ++r) {
        const Value<T> gradient = Widen(dys[r * block.stride + c]);
        sum += gradient;
        product += gradient * (Widen(xs[r * block.stride + c]) - shift[c]);
      }
      sum_dy[c] += static_cast<double>(sum);
      sum_product[c] += static_cast<double>(product);
    }
  }
}

template <typename T>
void UniformGradientSumsTyped(const BatchNormBlock& block, const T* x, const T* dy,
                              const BatchNormFactors& factors, double* sum_dy,
                              double* sum_product) {
  using V = Value<T>;
  const V shift = *static_cast<const V*>(factors.shift);
  ForEachRun(block, [&](std::int64_t offset, std::int64_t length) {
    const T* xs = x + offset;
    const T* dys = dy + offset;
    Lanes<T> sums[kVectors] = {}, products[kVectors] = {};
    V sum = 0, product = 0;
    OverRun<T>(
        length,
        [&](std::int64_t i, std::int64_t k) {
          Prefetch(xs + i, kAhead<T>);
          Prefetch(dys + i, kAhead<T>);
          const Lanes<T> gradient = Load(dys + i);
          sums[k] += gradient;
          products[k] += gradient * (Load(xs + i) - shift);
        },
        [&](std::int64_t i) {
          const V gradient = Widen(dys[i]);
          sum += gradient;
          product += gradient * (Widen(xs[i]) - shift);
        });
    *sum_dy += Total<T>(sums, static_cast<double>(sum));
    *sum_product += Total<T>(products, static_cast<double>(product));
  });
}

template <bool kUniform, bool kStreaming, typename T>
void GradientTyped(const BatchNormBlock& block, const T* x, const T* dy, T* dx, const bool* mask,
                   const BatchNormFactors& factors) {
  const Factor<kUniform, T> shift(factors.shift), scale(factors.scale), slope(factors.slope),
      offset(factors.offset);
  const Walk walk = WalkThrough<T>(block);
  for (std::int64_t i = 0; i < block.rows; ++i) {
    const std::int64_t r = walk.first + i * walk.step;
    const T* xs = x + r * block.stride;
    const T* dys = dy + r * block.stride;
    T* to = dx + r * block.stride;
    std::int64_t c = 0;
    if (mask != nullptr && !mask[r]) {
      for (; c + kLanes<T> <= block.columns; c += kLanes<T>) {
        Store<kStreaming>(to + c, scale.At(c) * Load(dys + c));
      }
      for (; c < block.columns; ++c) Store(to + c, scale.One(c) * Widen(dys[c]));
      continue;
    }
    for (; c + kLanes<T> <= block.columns; c += kLanes<T>) {
      Prefetch(xs + c, walk.ahead);
      Prefetch(dys + c, walk.ahead);
      const Lanes<T> mean = slope.At(c) * (Load(xs + c) - shift.At(c)) + offset.At(c);
      Store<kStreaming>(to + c, scale.At(c) * Load(dys + c) + mean);
    }
    for (; c < block.columns; ++c) {
      const Value<T> mean = slope.One(c) * (Widen(xs[c]) - shift.One(c)) + offset.One(c);
      Store(to + c, scale.One(c) * Widen(dys[c]) + mean);
    }
  }
  if (kStreaming) FinishStreaming();
}

// Calls function(pointer to the data type).
template <typename Function>
void WithType(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat16:
      return function(static_cast<Float16*>(nullptr));
    case DType::kBFloat16:
      return function(static_cast<BFloat16*>(nullptr));
    case DType::kFloat32:
      return function(static_cast<float*>(nullptr));
    case DType::kFloat64:
      return function(static_cast<double*>(nullptr));
  }
}

template <typename T>
const T* As(const T*, const void* data) {
  return static_cast<const T*>(data);
}
template <typename T>
T* As(const T*, void* data) {
  return static_cast<T*>(data);
}

void Moments(const BatchNormBlock& block, const void* x, const bool* mask, double* count,
             double* mean, double* centred) {
  WithType(block.dtype,
           [&](auto* type) { MomentsTyped(block, As(type, x), mask, count, mean, centred); });
}

void UniformMoments(const BatchNormBlock& block, const void* x, double* count, double* mean,
                    double* centred) {
  WithType(block.dtype,
           [&](auto* type) { UniformMomentsTyped(block, As(type, x), count, mean, centred); });
}

void MergeColumns(const double* mean, const double* centred, std::int64_t columns, double size,
                  double count, double* merged_mean, double* merged_centred) {
  const double share = size / (count + size);
  for (std::int64_t c = 0; c < columns; ++c) {
    const double delta = mean[c] - merged_mean[c];
    merged_centred[c] += centred[c] + delta * delta * (count * share);
    merged_mean[c] += delta * share;
  }
}

void Normalize(const BatchNormBlock& block, const void* x, void* y,
               const BatchNormFactors& factors) {
  WithType(block.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run =
        factors.uniform
            ? (factors.streaming ? NormalizeTyped<true, true, T> : NormalizeTyped<true, false, T>)
            : (factors.streaming ? NormalizeTyped<false, true, T>
                                 : NormalizeTyped<false, false, T>);
    run(block, As(type, x), As(type, y), factors);
  });
}

void GradientSums(const BatchNormBlock& block, const void* x, const void* dy,
                  const BatchNormFactors& factors, double* sum_dy, double* sum_product) {
  WithType(block.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = factors.uniform ? UniformGradientSumsTyped<T> : GradientSumsTyped<T>;
    run(block, As(type, x), As(type, dy), factors, sum_dy, sum_product);
  });
}

void Gradient(const BatchNormBlock& block, const void* x, const void* dy, void* dx,
              const bool* mask, const BatchNormFactors& factors) {
  WithType(block.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run =
        factors.uniform
            ? (factors.streaming ? GradientTyped<true, true, T> : GradientTyped<true, false, T>)
            : (factors.streaming ? GradientTyped<false, true, T> : GradientTyped<false, false, T>);
    run(block, As(type, x), As(type, dy), As(type, dx), mask, factors);
  });
}

}  // namespace

extern const BatchNormSpanFunctions kBatchNormSpanFunctions;
const BatchNormSpanFunctions kBatchNormSpanFunctions = {Moments,   UniformMoments, MergeColumns,
                                                        Normalize, GradientSums,   Gradient};

}  // namespace ACCUMOPS_INSTRUCTION_SET
}  // namespace accumops
