// What the ops' kernels share: types, reading inputs, threads, streams.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>

#include "dtype.h"
#include "parallel_for.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/lib/core/threadpool.h"

struct CUstream_st;

namespace accumops {

using ::tensorflow::DataType;
using ::tensorflow::DataTypeString;
using ::tensorflow::OpInputList;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;

// Takes the types that the ops' signatures admit. A variable's own type has to be checked before.
DType ToDType(DataType dtype);

// TensorFlow's own pool, so that an op never competes with it for cores.
class PoolExecutor : public Executor {
 public:
  explicit PoolExecutor(OpKernelContext* ctx);
  int concurrency() const override { return pool_->NumThreads(); }
  void Schedule(std::function<void()> task) override { pool_->Schedule(std::move(task)); }

 private:
  tensorflow::thread::ThreadPool* pool_;
};

// A kernel that shares its work among threads by itself. TensorFlow hands an expensive kernel to
// another thread first, and to wake that takes longer than to compute a small layer.
class ParallelKernel : public tensorflow::OpKernel {
 public:
  using OpKernel::OpKernel;
  bool IsExpensive() override { return false; }
};

// Reads the input `name`, which must be a scalar.
absl::Status RequireScalar(OpKernelContext* ctx, const char* name, const Tensor** scalar);

// The value of a scalar of float or double in host memory.
double NumberOf(const Tensor& scalar);

// Reads the input `name`, a list of one flag in host memory or of none, which counts as true.
absl::Status ReadOptionalFlag(OpKernelContext* ctx, const char* name, bool* flag);

absl::Status CopyOnHost(OpKernelContext* ctx, void* to, const void* from, std::size_t bytes);

#if defined(ACCUMOPS_CUDA)
CUstream_st* CudaStream(OpKernelContext* ctx);
// The error whose text a launcher returned, or none for null.
absl::Status FromCuda(const char* error);
absl::Status CopyOnDevice(OpKernelContext* ctx, void* to, const void* from, std::size_t bytes);
#endif

}  // namespace accumops
