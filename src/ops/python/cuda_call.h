// What a call on CUDA arrays needs around the kernel. Included where ACCUMOPS_CUDA is defined.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "array.h"

namespace accumops {

inline void CheckCuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the next call must not find it
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
}

// Puts the call's arrays, stream and memory in order before the kernel is launched, and again
// after it.
class CudaCall {
 public:
  // `arrays` are all that the call touches. Their memory must belong to one device, which is the
  // current one until this object goes.
  CudaCall(const std::vector<const Array*>& arrays, std::uintptr_t stream)
      : stream_(reinterpret_cast<cudaStream_t>(stream)) {
    const int device = RequireOneDevice(arrays);
    CheckCuda(cudaGetDevice(&previous_device_), "cudaGetDevice");
    if (device >= 0) CheckCuda(cudaSetDevice(device), "cudaSetDevice");
  }
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;

  ~CudaCall() {
    for (void* memory : memory_) cudaFreeAsync(memory, stream_);
    cudaSetDevice(previous_device_);
  }

  // Before the kernel: the stream waits for the streams that the arrays' interfaces name.
  void Start(const std::vector<const Array*>& arrays) {
    for (const Array* array : arrays) {
      const auto producer = reinterpret_cast<cudaStream_t>(array->producer_stream);
      if (producer == nullptr || Same(producer, stream_) ||
          std::find(producers_.begin(), producers_.end(), producer) != producers_.end()) {
        continue;
      }
      producers_.push_back(producer);
      Order(producer, stream_);
    }
  }

  cudaStream_t stream() const { return stream_; }

  // Device memory for as long as this object lives.
  void* Allocate(std::size_t bytes) {
    if (bytes == 0) return nullptr;
    void* memory = nullptr;
    memory_.reserve(memory_.size() + 1);
    CheckCuda(cudaMallocAsync(&memory, bytes, stream_), "cudaMallocAsync");
    memory_.push_back(memory);
    return memory;
  }

  // A copy in device memory of the host's values for the arguments `names`, made in stream order.
  template <typename Values>
  const Values* Upload(const Values& values, const char* names) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    CheckCuda(cudaStreamIsCapturing(stream_, &capture), "cudaStreamIsCapturing");
    if (capture != cudaStreamCaptureStatusNone) {
      throw py::value_error(
          std::string(names) +
          " must be device arrays while the stream is captured into a graph: the graph would read "
          "a Python number's memory after it is gone");
    }
    void* const memory = Allocate(sizeof values);
    CheckCuda(cudaMemcpyAsync(memory, &values, sizeof values, cudaMemcpyHostToDevice, stream_),
              "cudaMemcpyAsync");
    return static_cast<const Values*>(memory);
  }

  // After the kernel: what the arrays' owners enqueue next, on their streams, finds its results.
  void Finish() {
    for (const cudaStream_t producer : producers_) Order(stream_, producer);
  }

 private:
  static bool Same(cudaStream_t a, cudaStream_t b) {
    const auto named = [](cudaStream_t stream) {
      return stream == nullptr ? cudaStreamLegacy : stream;
    };
    return named(a) == named(b);
  }

  static void Order(cudaStream_t first, cudaStream_t second) {
    cudaEvent_t event;
    CheckCuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
    cudaError_t error = cudaEventRecord(event, first);
    if (error == cudaSuccess) error = cudaStreamWaitEvent(second, event, 0);
    cudaEventDestroy(event);
    CheckCuda(error, "ordering two CUDA streams");
  }

  // An address that is no device memory would be an error only once the kernel runs, and then one
  // that leaves the process without CUDA.
  static int RequireOneDevice(const std::vector<const Array*>& arrays) {
    int device = -1;
    const Array* first = nullptr;
    for (const Array* array : arrays) {
      if (array->size == 0) continue;
      cudaPointerAttributes attributes;
      CheckCuda(cudaPointerGetAttributes(&attributes, array->data), "cudaPointerGetAttributes");
      if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged) {
        throw py::value_error(array->name.str() +
                              " has __cuda_array_interface__, but its address is not in CUDA "
                              "memory; pass an array that is alive and on a GPU");
      }
      if (first == nullptr) {
        first = array;
        device = attributes.device;
      } else if (attributes.device != device) {
        throw py::value_error(array->name.str() + " is on GPU " +
                              std::to_string(attributes.device) + ", but " + first->name.str() +
                              " is on GPU " + std::to_string(device) +
                              "; pass all arrays of one call on one GPU");
      }
    }
    return device;
  }

  cudaStream_t stream_;
  int previous_device_ = 0;
  std::vector<cudaStream_t> producers_;
  std::vector<void*> memory_;
};

}  // namespace accumops
