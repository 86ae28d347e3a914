// Cuts a list of tensors into blocks of one tensor each, for the threads to share. The cuts depend
// on the sizes alone.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "parallel_for.h"

namespace accumops {

class Blocks {
 public:
  // `sizes[i]` values in tensor i, at most `block_size` in a block.
  Blocks(const std::vector<std::int64_t>& sizes, std::int64_t block_size)
      : sizes_(sizes), block_size_(block_size), starts_(sizes.size() + 1, 0) {
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      starts_[i + 1] = starts_[i] + (sizes[i] + block_size - 1) / block_size;
    }
  }

  std::int64_t count() const { return starts_.back(); }
  // The blocks of tensor i are those from first(i) to first(i + 1).
  std::int64_t first(std::size_t i) const { return starts_[i]; }

  // Calls body(block, tensor, begin, end) for each block, on the executor's threads.
  template <typename Body>
  void ForEach(Executor& executor, const Body& body) const {
    ParallelFor(executor, count(), [&](std::int64_t block) {
      const auto i = static_cast<std::size_t>(
          std::upper_bound(starts_.begin(), starts_.end(), block) - starts_.begin() - 1);
      const std::int64_t begin = (block - starts_[i]) * block_size_;
      body(block, i, begin, std::min(begin + block_size_, sizes_[i]));
    });
  }

 private:
  std::vector<std::int64_t> sizes_;
  std::int64_t block_size_;
  std::vector<std::int64_t> starts_;
};

}  // namespace accumops
