#include "memory_bandwidth.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "span.h"

namespace accumops {
namespace {

constexpr std::int64_t kChunk = 64 << 10;  // values: 256 KiB of each array

template <typename Body>
void ForEachChunk(std::int64_t size, Executor& executor, const Body& body) {
  ParallelFor(executor, (size + kChunk - 1) / kChunk, [&](std::int64_t chunk) {
    const std::int64_t begin = chunk * kChunk;
    body(begin, std::min(kChunk, size - begin));
  });
}

struct Free {
  void operator()(float* data) const { std::free(data); }
};
using Floats = std::unique_ptr<float[], Free>;

// Untouched memory on huge pages where the system grants them, as NumPy's and TensorFlow's large
// arrays are: with small ones, the triad would measure address translation.
Floats Allocate(std::int64_t size) {
  constexpr std::size_t kHugePage = 2 << 20;
  const std::size_t bytes = static_cast<std::size_t>(size) * sizeof(float);
  const std::size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* data = rounded < bytes ? nullptr : std::aligned_alloc(kHugePage, rounded);
  if (data == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(data, rounded, MADV_HUGEPAGE);
#endif
  return Floats(static_cast<float*>(data));
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 != 0 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

}  // namespace

void Triad(float* a, const float* b, const float* c, float scale, std::int64_t size, bool streaming,
           Executor& executor) {
  const SpanFunctions& functions = CurrentSpanFunctions();
  ForEachChunk(size, executor, [&](std::int64_t begin, std::int64_t length) {
    functions.triad(a + begin, b + begin, c + begin, scale, length, streaming);
  });
}

MemoryBandwidth MeasureMemoryBandwidth(std::int64_t bytes_per_array, int repeats,
                                       Executor& executor) {
  const std::int64_t size = bytes_per_array / static_cast<std::int64_t>(sizeof(float));
  const Floats a = Allocate(size), b = Allocate(size), c = Allocate(size);
  ForEachChunk(size, executor, [&](std::int64_t begin, std::int64_t length) {
    std::fill_n(&a[begin], length, 0.0f);
    std::fill_n(&b[begin], length, 1.0f);
    std::fill_n(&c[begin], length, 2.0f);
  });

  const auto bytes_per_second = [&](bool streaming) {
    const auto start = std::chrono::steady_clock::now();
    Triad(a.get(), b.get(), c.get(), 3.0f, size, streaming, executor);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    // A clock that did not move, on a tiny array, must not make the rate infinite.
    return static_cast<double>(3 * sizeof(float)) * static_cast<double>(size) /
           std::max(seconds.count(), 1e-9);
  };
  std::vector<double> plain, streaming;
  for (int i = 0; i < repeats; ++i) {
    plain.push_back(bytes_per_second(false));
    streaming.push_back(bytes_per_second(true));
  }
  return {Median(plain), Median(streaming)};
}

}  // namespace accumops
