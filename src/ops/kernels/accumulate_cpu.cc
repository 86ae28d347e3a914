#include <algorithm>
#include <atomic>
#include <vector>

#include "accumulate.h"
#include "span.h"

namespace accumops {
namespace {

// Work is cut by bytes moved, so that a huge tensor is shared and many tiny ones travel together.
// About 10 µs each.
constexpr std::int64_t kChunkBytes = 256 << 10;
// Cuts within a tensor fall on multiples of this, so that no two threads write one cache line.
constexpr std::int64_t kCutElements = 64;
// Above this, accumulators that are only written bypass the caches: forward and backward of the
// next micro-batch would evict them anyway, and a store that is not streamed reads its line first.
constexpr std::int64_t kStreamingBytes = 16 << 20;

std::int64_t BytesPerElement(const AccumulateItem& item) {
  return static_cast<std::int64_t>(SizeOf(item.accumulator_dtype) + SizeOf(item.gradient_dtype));
}

// The element at byte `offset` of an item's work, rounded down to a place for a cut. An offset
// before the item gives 0, one past it the item's size.
std::int64_t Cut(const AccumulateItem& item, std::int64_t offset) {
  if (offset <= 0) return 0;
  const std::int64_t element = offset / BytesPerElement(item);
  return element >= item.size ? item.size : element / kCutElements * kCutElements;
}

}  // namespace

void AccumulateCpu(const AccumulateItem* items, std::size_t count, double scale, bool overwrite,
                   const AccumulateReport& report, Executor& executor) {
  std::vector<std::int64_t> starts(count + 1, 0);  // bytes of work before each item
  std::int64_t accumulator_bytes = 0;
  for (std::size_t i = 0; i < count; ++i) {
    starts[i + 1] = starts[i] + items[i].size * BytesPerElement(items[i]);
    accumulator_bytes +=
        items[i].size * static_cast<std::int64_t>(SizeOf(items[i].accumulator_dtype));
  }
  const SpanFunctions& functions = CurrentSpanFunctions();
  const bool streaming =
      overwrite && accumulator_bytes >= kStreamingBytes && static_cast<float>(scale) != 0;
  const std::int64_t chunks = (starts[count] + kChunkBytes - 1) / kChunkBytes;
  // Of chunk c's part of item i at c + i: from one part to the next, one of the two grows.
  std::vector<SpanNorms> norms;
  if (report.squared_norms != nullptr) norms.resize(static_cast<std::size_t>(chunks) + count);
  std::atomic<bool> finite{true};

  const auto run_chunk = [&](std::int64_t chunk) {
    const std::int64_t begin = chunk * kChunkBytes;
    const std::int64_t end = begin + kChunkBytes;
    auto i = static_cast<std::size_t>(std::upper_bound(starts.begin(), starts.end(), begin) -
                                      starts.begin() - 1);
    for (; i < count && starts[i] < end; ++i) {
      const AccumulateItem& item = items[i];
      const std::int64_t first = Cut(item, begin - starts[i]);
      const std::int64_t last = Cut(item, end - starts[i]);
      if (first == last) continue;
      const auto at = [first](auto* data, DType dtype) {
        return data + first * static_cast<std::int64_t>(SizeOf(dtype));
      };
      const Span span = {at(static_cast<char*>(item.accumulator), item.accumulator_dtype),
                         at(static_cast<const char*>(item.gradient), item.gradient_dtype),
                         last - first,
                         item.accumulator_dtype,
                         item.gradient_dtype,
                         scale,
                         overwrite,
                         streaming && item.accumulator_dtype == DType::kFloat32,
                         report.all_finite != nullptr};
      const bool fine = norms.empty() ? functions.accumulate(span)
                                      : functions.accumulate_with_norms(
                                            span, norms[static_cast<std::size_t>(chunk) + i]);
      if (!fine) finite.store(false, std::memory_order_relaxed);
    }
  };
  ParallelFor(executor, chunks, run_chunk);
  if (report.all_finite != nullptr && !finite.load(std::memory_order_relaxed)) {
    *report.all_finite = false;
  }
  if (report.squared_norms == nullptr) return;
  for (std::size_t i = 0; i < count; ++i) {
    SpanNorms total;
    if (starts[i] < starts[i + 1]) {
      for (std::int64_t c = starts[i] / kChunkBytes; c <= (starts[i + 1] - 1) / kChunkBytes; ++c) {
        total.gradient += norms[static_cast<std::size_t>(c) + i].gradient;
        total.accumulator += norms[static_cast<std::size_t>(c) + i].accumulator;
      }
    }
    report.squared_norms[i] = total.gradient;
    report.squared_norms[count + i] = total.accumulator;
  }
}

}  // namespace accumops
