#include "kernel_support.h"

#include <cstring>

#include "absl/strings/str_cat.h"
#include "input_checks.h"
#if defined(ACCUMOPS_CUDA)
#include "device_memory.h"
#include "tensorflow/core/framework/device_base.h"
#include "xla/stream_executor/stream.h"
#endif

namespace accumops {

DType ToDType(DataType dtype) {
  switch (dtype) {
    case tensorflow::DT_HALF:
      return DType::kFloat16;
    case tensorflow::DT_BFLOAT16:
      return DType::kBFloat16;
    case tensorflow::DT_DOUBLE:
      return DType::kFloat64;
    default:
      return DType::kFloat32;
  }
}

PoolExecutor::PoolExecutor(OpKernelContext* ctx)
    : pool_(ctx->device()->tensorflow_cpu_worker_threads()->workers) {}

absl::Status RequireScalar(OpKernelContext* ctx, const char* name, const Tensor** scalar) {
  TF_RETURN_IF_ERROR(ctx->input(name, scalar));
  return CheckScalar(name, (*scalar)->shape());
}

double NumberOf(const Tensor& scalar) {
  return scalar.dtype() == tensorflow::DT_DOUBLE ? scalar.scalar<double>()()
                                                 : scalar.scalar<float>()();
}

absl::Status ReadOptionalFlag(OpKernelContext* ctx, const char* name, bool* flag) {
  OpInputList flags;
  TF_RETURN_IF_ERROR(ctx->input_list(name, &flags));
  if (flags.size() > 1 || (flags.size() == 1 && flags[0].dims() != 0)) return NotOneFlag(name);
  *flag = flags.size() == 0 || flags[0].scalar<bool>()();
  return absl::OkStatus();
}

absl::Status CopyOnHost(OpKernelContext*, void* to, const void* from, std::size_t bytes) {
  std::memcpy(to, from, bytes);
  return absl::OkStatus();
}

#if defined(ACCUMOPS_CUDA)
CUstream_st* CudaStream(OpKernelContext* ctx) {
  return static_cast<CUstream_st*>(
      ctx->op_device_context()->stream()->platform_specific_handle().stream);
}

absl::Status FromCuda(const char* error) {
  return error == nullptr ? absl::OkStatus()
                          : absl::InternalError(absl::StrCat("accumops on the GPU: ", error));
}

absl::Status CopyOnDevice(OpKernelContext* ctx, void* to, const void* from, std::size_t bytes) {
  return FromCuda(CopyCuda(to, from, bytes, CudaStream(ctx)));
}
#endif

}  // namespace accumops
