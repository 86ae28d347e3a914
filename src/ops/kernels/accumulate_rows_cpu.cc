#include <algorithm>
#include <atomic>
#include <cstring>

#include "accumulate_rows.h"
#include "span.h"

namespace accumops {
namespace {

// Below this many bytes of work, waking another thread costs more than it saves.
constexpr std::int64_t kInlineBytes = 256 << 10;

template <typename Index>
std::int64_t FindBad(const Index* indices, std::int64_t count, std::int64_t rows) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (indices[i] < 0 || static_cast<std::int64_t>(indices[i]) >= rows) return i;
  }
  return -1;
}

// Whether a scale is 0 once it has an accumulator's type.
bool IsZeroIn(DType accumulator_dtype, double scale) {
  return accumulator_dtype == DType::kFloat64 ? scale == 0 : static_cast<float>(scale) == 0;
}

void ClearRows(const AccumulateRowsItem& item, Executor& executor) {
  const auto row_bytes = static_cast<std::size_t>(item.columns) * SizeOf(item.accumulator_dtype);
  if (row_bytes == 0) {
    if (item.touched_rows != nullptr) {
      std::memset(item.touched_rows, 0, static_cast<std::size_t>(item.rows));
    }
    return;
  }
  const std::int64_t rows_per_chunk =
      std::max<std::int64_t>(1, kInlineBytes / static_cast<std::int64_t>(row_bytes));
  const auto clear = [&](std::int64_t chunk) {
    const std::int64_t first = chunk * rows_per_chunk;
    const std::int64_t last = std::min(first + rows_per_chunk, item.rows);
    char* data = static_cast<char*>(item.accumulator);
    if (item.touched_rows == nullptr) {
      std::memset(data + static_cast<std::size_t>(first) * row_bytes, 0,
                  static_cast<std::size_t>(last - first) * row_bytes);
      return;
    }
    bool* flag = item.touched_rows + first;
    bool* const end = item.touched_rows + last;
    // memchr skips the long runs of untouched rows many at a time.
    while (flag != end && (flag = static_cast<bool*>(std::memchr(
                               flag, 1, static_cast<std::size_t>(end - flag)))) != nullptr) {
      std::memset(data + static_cast<std::size_t>(flag - item.touched_rows) * row_bytes, 0,
                  row_bytes);
      *flag++ = false;
    }
  };
  ParallelFor(executor, (item.rows + rows_per_chunk - 1) / rows_per_chunk, clear);
}

template <typename Index>
bool AddRows(const AccumulateRowsItem& item, const Index* indices, double scale, bool check_finite,
             Executor& executor) {
  const auto columns = item.columns;
  const auto accumulator_row = columns * static_cast<std::int64_t>(SizeOf(item.accumulator_dtype));
  const auto values_row = columns * static_cast<std::int64_t>(SizeOf(item.values_dtype));
  const std::int64_t bytes = item.count * (2 * accumulator_row + values_row);
  const auto parts =
      bytes <= kInlineBytes ? 1u : static_cast<std::uint32_t>(executor.concurrency());
  const SpanFunctions& functions = CurrentSpanFunctions();
  const bool counts = !IsZeroIn(item.accumulator_dtype, scale);
  std::atomic<bool> finite{true};
  if (!counts && !check_finite) return true;

  // Each part owns some rows and walks all positions in order: no two threads meet in a row, and a
  // row's additions have the order of the positions, however many parts there are.
  const auto add = [&](std::int64_t part) {
    for (std::int64_t i = 0; i < item.count; ++i) {
      const auto row = static_cast<std::int64_t>(indices[i]);
      // The multiplication scatters neighbouring rows, which are often equally popular, over the
      // parts.
      const std::uint32_t hash = static_cast<std::uint32_t>(row) * 0x9e3779b1u;
      if (parts > 1 &&
          (static_cast<std::uint64_t>(hash) * parts >> 32) != static_cast<std::uint64_t>(part)) {
        continue;
      }
      const Span span = {static_cast<char*>(item.accumulator) + row * accumulator_row,
                         static_cast<const char*>(item.values) + i * values_row,
                         columns,
                         item.accumulator_dtype,
                         item.values_dtype,
                         scale,
                         /*overwrite=*/false,
                         /*streaming=*/false,
                         check_finite};
      if (!functions.accumulate(span)) finite.store(false, std::memory_order_relaxed);
      if (counts && item.touched_rows != nullptr) item.touched_rows[row] = true;
    }
  };
  ParallelFor(executor, parts, add);
  return finite.load(std::memory_order_relaxed);
}

}  // namespace

std::int64_t FindBadIndex(const void* indices, bool indices_are_int64, std::int64_t count,
                          std::int64_t rows) {
  return indices_are_int64 ? FindBad(static_cast<const std::int64_t*>(indices), count, rows)
                           : FindBad(static_cast<const std::int32_t*>(indices), count, rows);
}

void AccumulateRowsCpu(const AccumulateRowsItem& item, double scale, bool overwrite,
                       bool* all_finite, Executor& executor) {
  if (overwrite) ClearRows(item, executor);
  const bool check = all_finite != nullptr;
  const bool finite =
      item.indices_are_int64
          ? AddRows(item, static_cast<const std::int64_t*>(item.indices), scale, check, executor)
          : AddRows(item, static_cast<const std::int32_t*>(item.indices), scale, check, executor);
  if (check && !finite) *all_finite = false;
}

}  // namespace accumops
