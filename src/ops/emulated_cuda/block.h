// Runs the blocks of a kernel on a CPU: each CUDA thread is a fiber, and blocks and threads run in
// random order. Stops the process with a message where a kernel breaks CUDA's rules for barriers
// and warps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "cuda_runtime_api.h"

namespace emulated {

constexpr int kWarpSize = 32;

enum class WarpOperation { kShuffle, kShuffleUp, kShuffleDown, kBallot };

// Within a kernel: where the calling thread stands.
const uint3& ThreadIndex();
const uint3& BlockIndex();
const uint3& GridSize();

// Within a kernel: waits for all threads of the block.
void SyncThreads();

// Within a kernel: the values that the lanes of `mask` give, by lane. Waits for all of them. As on
// a GPU, it orders no accesses to memory.
const std::uint64_t* Exchange(WarpOperation operation, unsigned mask, std::uint64_t value);

// Within a kernel: the block's shared memory for the declaration `key`. All its bits are set when a
// block begins.
void* SharedMemory(const void* key, std::size_t bytes, std::size_t alignment);

// Runs a kernel: `thread` is called once for each thread. `name` is for messages.
void RunGrid(const char* name, unsigned blocks, unsigned threads,
             const std::function<void()>& thread);

void SeedBlocks(unsigned seed);

// Enqueues a kernel's launch. The parameters are copied, as CUDA copies them.
cudaError_t EnqueueGrid(const char* name, std::int64_t blocks, int threads,
                        std::function<void()> thread, cudaStream_t stream);

template <typename Params>
cudaError_t Launch(void (*kernel)(const Params&), std::int64_t blocks, int threads,
                   const Params& params, cudaStream_t stream) {
  return EnqueueGrid(__PRETTY_FUNCTION__, blocks, threads, [=] { kernel(params); }, stream);
}

}  // namespace emulated
