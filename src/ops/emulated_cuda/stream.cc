// CUDA's runtime: see cuda_runtime_api.h.
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "block.h"

namespace {

constexpr std::size_t kAlignment = 256;

struct Work {
  std::function<bool()> ready;  // none: always
  std::function<void()> run;
};

struct Moment {
  bool reached = false;
};

std::mutex mutex;  // guards all that follows
std::map<cudaStream_t, std::deque<Work>> streams;
std::map<const char*, std::size_t> allocations;  // bytes, by address
std::mt19937 random_engine(1);

// The default stream has two names.
cudaStream_t Named(cudaStream_t stream) { return stream == cudaStreamLegacy ? nullptr : stream; }

cudaError_t Enqueue(cudaStream_t stream, Work work) {
  const std::lock_guard<std::mutex> lock(mutex);
  streams[Named(stream)].push_back(std::move(work));
  return cudaSuccess;
}

cudaError_t Enqueue(cudaStream_t stream, std::function<void()> run) {
  return Enqueue(stream, Work{nullptr, std::move(run)});
}

// The next work of a stream that can go on, chosen at random; none where all are done.
bool TakeWork(Work& work) {
  const std::lock_guard<std::mutex> lock(mutex);
  std::vector<std::deque<Work>*> able;
  for (auto& [stream, queue] : streams) {
    if (!queue.empty() && (!queue.front().ready || queue.front().ready())) able.push_back(&queue);
  }
  if (able.empty()) return false;
  std::deque<Work>& queue = *able[random_engine() % able.size()];
  work = std::move(queue.front());
  queue.pop_front();
  return true;
}

}  // namespace

struct CUevent_st {
  std::shared_ptr<Moment> moment = std::make_shared<Moment>();
};

extern "C" {

__attribute__((visibility("default"))) void* emulated_cuda_allocate(std::size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, bytes) != 0) return nullptr;
  std::memset(memory, 0xFF, bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  allocations[static_cast<const char*>(memory)] = bytes;
  return memory;
}

__attribute__((visibility("default"))) void emulated_cuda_free(void* memory) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    allocations.erase(static_cast<const char*>(memory));
  }
  std::free(memory);
}

__attribute__((visibility("default"))) void emulated_cuda_synchronize() {
  static std::mutex running;
  const std::lock_guard<std::mutex> lock(running);
  for (Work work; TakeWork(work);) {
    work.run();
    work = {};
  }
}

__attribute__((visibility("default"))) void emulated_cuda_seed(unsigned seed) {
  const std::lock_guard<std::mutex> lock(mutex);
  random_engine.seed(seed);
  emulated::SeedBlocks(seed);
}

}  // extern "C"

namespace emulated {

cudaError_t EnqueueGrid(const char* name, std::int64_t blocks, int threads,
                        std::function<void()> thread, cudaStream_t stream) {
  constexpr std::int64_t kMaxBlocks = 0x7fffffff;
  if (blocks < 1 || blocks > kMaxBlocks || threads < 1 || threads > 1024) {
    return cudaErrorInvalidValue;
  }
  return Enqueue(stream, [=] {
    RunGrid(name, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), thread);
  });
}

}  // namespace emulated

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

// Few processors, so that grids whose size follows from them have several rounds.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? 5
           : attribute == cudaDevAttrComputeCapabilityMajor ? 9
                                                            : 0;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  const auto* const byte = static_cast<const char*>(address);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto after = allocations.upper_bound(byte);
  bool inside = false;
  if (after != allocations.begin()) {
    const auto& [begin, bytes] = *std::prev(after);
    inside = byte < begin + bytes;
  }
  *attributes = {inside ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered, 0};
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** memory, std::size_t bytes, cudaStream_t) {
  *memory = emulated_cuda_allocate(bytes);
  return *memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
  return Enqueue(stream, [=] { emulated_cuda_free(memory); });
}

// CUDA reads a host's memory that is not pinned before the call returns.
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (kind == cudaMemcpyHostToDevice) {
    const auto* const begin = static_cast<const char*>(from);
    const std::vector<char> copy(begin, begin + bytes);
    return Enqueue(stream, [=] { std::memcpy(to, copy.data(), bytes); });
  }
  return Enqueue(stream, [=] { std::memcpy(to, from, bytes); });
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  return Enqueue(stream, [=] { std::memset(to, value, bytes); });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->moment = std::make_shared<Moment>();
  return Enqueue(stream, [moment = event->moment] { moment->reached = true; });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return Enqueue(stream, Work{[moment = event->moment] { return moment->reached; }, [] {}});
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
