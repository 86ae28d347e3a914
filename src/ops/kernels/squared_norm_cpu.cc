#include <numeric>
#include <vector>

#include "blocks.h"
#include "squared_norm.h"
#include "update_span.h"

namespace accumops {
namespace {

constexpr std::int64_t kBlockSize = 32768;  // values, some 10 µs

}  // namespace

void SquaredNormsCpu(const SquaredNormItem* items, std::size_t count, double* sums,
                     Executor& executor) {
  const UpdateSpanFunctions& functions = CurrentUpdateSpanFunctions();
  std::vector<std::int64_t> sizes(count);
  for (std::size_t i = 0; i < count; ++i) sizes[i] = items[i].size;
  const Blocks blocks(sizes, kBlockSize);
  std::vector<double> partial(static_cast<std::size_t>(blocks.count()));
  blocks.ForEach(executor,
                 [&](std::int64_t block, std::size_t i, std::int64_t begin, std::int64_t end) {
                   const SquaredNormItem& item = items[i];
                   const char* from = static_cast<const char*>(item.values) +
                                      begin * static_cast<std::int64_t>(SizeOf(item.dtype));
                   partial[static_cast<std::size_t>(block)] =
                       functions.squared_norm(from, end - begin, item.dtype);
                 });
  for (std::size_t i = 0; i < count; ++i) {
    sums[i] = std::accumulate(partial.begin() + blocks.first(i),
                              partial.begin() + blocks.first(i + 1), 0.0);
  }
}

}  // namespace accumops
