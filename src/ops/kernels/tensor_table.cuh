// Lists of tensors as kernel parameters, "tables": filling them, choosing their size, and finding a
// block's tensor in one. A kernel does a list in chunks, one for each block of its grid.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstddef>
#include <cstdint>

namespace accumops {
namespace cuda {

// How large a kernel's parameters may be: with every version of CUDA, and with this one.
constexpr std::size_t kSmallParamBytes = 4096;
constexpr std::size_t kLargeParamBytes = CUDART_VERSION >= 12010 ? 32764 : kSmallParamBytes;

// The capacity of a table that needs large parameters. Where there are none, it is the small one.
constexpr int LargeCapacity(int capacity, int small_capacity) {
  return kLargeParamBytes > kSmallParamBytes ? capacity : small_capacity;
}

constexpr std::int64_t kMaxChunks = INT_MAX;  // of a grid

constexpr std::int64_t ChunksOf(std::int64_t size, std::int64_t chunk_size) {
  return size / chunk_size + (size % chunk_size != 0);
}

// The last entry whose first chunk is not beyond `chunk`.
template <typename Chunk>
__host__ __device__ int FindEntry(const Chunk* first_chunk, int count, Chunk chunk) {
  int low = 0;
  int high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// An entry of a table and the chunks of its tensor that it covers: all of them, unless a grid
// cannot have so many.
struct TablePart {
  int entry;                 // its position in the table
  std::int64_t first_chunk;  // of the entry, counted through the table
  std::int64_t begin;        // the tensor's first chunk that is in the entry
  std::int64_t chunks;
};

// Fills tables with a list, in order, where tensor i has `chunks_of(i)` chunks: `fill(i, part)` for
// each entry of a table, then `launch(entries, chunks)`. Tensors without chunks are left out.
template <typename CountChunks, typename Fill, typename Launcher>
cudaError_t ForEachTable(std::size_t count, int capacity, CountChunks chunks_of, Fill fill,
                         Launcher launch) {
  int entries = 0;
  std::int64_t chunks = 0;
  const auto flush = [&] {
    const cudaError_t error = entries == 0 ? cudaSuccess : launch(entries, chunks);
    entries = 0;
    chunks = 0;
    return error;
  };
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t needed = chunks_of(i);
    for (std::int64_t begin = 0; begin < needed;) {
      if (entries == capacity || chunks == kMaxChunks) {
        const cudaError_t error = flush();
        if (error != cudaSuccess) return error;
      }
      const std::int64_t left = needed - begin;
      const std::int64_t room = kMaxChunks - chunks;
      const std::int64_t taken = left < room ? left : room;
      fill(i, TablePart{entries, chunks, begin, taken});
      ++entries;
      chunks += taken;
      begin += taken;
    }
  }
  return flush();
}

inline bool DriverTakesLargeParams() {
  static const bool result = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12010;
  }();
  return result;
}

// All of a table is copied at each launch, so a short list gets a small table. Returns the launcher
// of the small table, or `large` where the small one cannot hold `count` tensors and the driver
// takes large parameters.
template <typename Small, typename Large, typename Launcher>
Launcher ChooseTable(std::size_t count, Launcher small, Launcher large) {
  static_assert(sizeof(Small) <= kSmallParamBytes, "too large for a kernel parameter");
  static_assert(sizeof(Large) <= kLargeParamBytes, "too large for a kernel parameter");
  return count > Small::kCapacity && DriverTakesLargeParams() ? large : small;
}

}  // namespace cuda
}  // namespace accumops
