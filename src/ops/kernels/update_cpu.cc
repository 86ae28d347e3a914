#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "blocks.h"
#include "update.h"
#include "update_rate.h"
#include "update_span.h"

namespace accumops {
namespace {

// About 10 µs of work each.
constexpr std::int64_t kBlockSize = 8192;

// The values of `item` from `begin` to `end`.
UpdateSpan SpanOf(const UpdateItem& item, std::int64_t begin, std::int64_t end, float scale,
                  const UpdateScalars& scalars) {
  UpdateSpan span = {};
  span.value = item.value + begin;
  for (int i = 0; i < kMaxSlots; ++i) {
    span.slots[i] = item.slots[i] == nullptr ? nullptr : item.slots[i] + begin;
  }
  const bool counts = item.accumulator != nullptr && !*scalars.overwrite;
  span.accumulator = counts ? item.accumulator + begin : nullptr;
  if (item.latest != nullptr && *scalars.weight != 0) {
    span.latest = static_cast<const char*>(item.latest) +
                  begin * static_cast<std::int64_t>(SizeOf(item.latest_dtype));
  }
  span.size = end - begin;
  span.latest_dtype = item.latest_dtype;
  span.scale = scale;
  span.weight = *scalars.weight;
  span.rate = *scalars.rate;
  span.decay = *scalars.decay;
  span.decays = item.decays;
  return span;
}

}  // namespace

void UpdateCpu(const UpdateItem* items, std::size_t count, const UpdateSettings& settings,
               const UpdateScalars& given, Executor& executor) {
  if (!*given.applies) return;
  UpdateScalars scalars = given;
  float rate = *given.rate;
  if (given.iterations != nullptr) {
    rate *= std::sqrt(BiasOf(settings.beta_2, *given.iterations));
    rate /= BiasOf(settings.beta_1, *given.iterations);
  }
  scalars.rate = &rate;
  const UpdateSpanFunctions& functions = CurrentUpdateSpanFunctions();
  std::vector<std::int64_t> sizes(count);
  for (std::size_t i = 0; i < count; ++i) sizes[i] = items[i].size;
  const Blocks blocks(sizes, kBlockSize);
  blocks.ForEach(executor, [&](std::int64_t, std::size_t i, std::int64_t begin, std::int64_t end) {
    const UpdateItem& item = items[i];
    const float scale = scalars.scales[scalars.scale_for_each ? i : 0];
    const auto update = [&](std::int64_t from, std::int64_t to) {
      functions.update(SpanOf(item, from, to, scale, scalars), settings);
    };
    if (item.touched_rows == nullptr) {
      update(begin, end);
      return;
    }
    const bool* flags = item.touched_rows;
    const bool* last = flags + (end + item.row_size - 1) / item.row_size;
    const bool* row = flags + begin / item.row_size;
    const auto next = [last](const bool* from) {
      return static_cast<const bool*>(std::memchr(from, 1, static_cast<std::size_t>(last - from)));
    };
    while ((row = next(row)) != nullptr) {
      const std::int64_t start = (row - flags) * item.row_size;
      update(std::max(begin, start), std::min(end, start + item.row_size));
      ++row;
    }
  });
}

}  // namespace accumops
