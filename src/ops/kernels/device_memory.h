// The few operations on device memory that the callers of the CUDA kernels need besides them.
#pragma once

#include <cstddef>

struct CUstream_st;

namespace accumops {

// Each returns null, or the text of the CUDA error.
const char* SetFlagCuda(bool* flag, bool value, CUstream_st* stream);
const char* FillWithNanCuda(double* values, std::size_t count, CUstream_st* stream);
const char* CopyCuda(void* to, const void* from, std::size_t bytes, CUstream_st* stream);

}  // namespace accumops
