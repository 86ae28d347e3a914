#include <cuda_runtime_api.h>

#include "device_memory.h"

namespace accumops {
namespace {

const char* ErrorText(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* SetFlagCuda(bool* flag, bool value, CUstream_st* stream) {
  static_assert(sizeof(bool) == 1, "a flag is set as one byte");
  return ErrorText(cudaMemsetAsync(flag, value ? 1 : 0, 1, stream));
}

const char* FillWithNanCuda(double* values, std::size_t count, CUstream_st* stream) {
  // A double of nothing but ones is a NaN.
  return ErrorText(cudaMemsetAsync(values, 0xff, count * sizeof(double), stream));
}

const char* CopyCuda(void* to, const void* from, std::size_t bytes, CUstream_st* stream) {
  return ErrorText(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream));
}

}  // namespace accumops
