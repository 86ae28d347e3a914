// What the ops' kernels share: types, threads, streams.
#pragma once

#include <cstddef>
#include <functional>
#include <utility>

#include "dtype.h"
#include "parallel_for.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/lib/core/threadpool.h"

struct CUstream_st;

namespace accumops {

// For the types that the ops' signatures admit; a variable's own type is checked before.
DType ToDType(tensorflow::DataType dtype);

// TensorFlow's own pool, so that an op never competes with it for cores.
class PoolExecutor : public Executor {
 public:
  explicit PoolExecutor(tensorflow::OpKernelContext* ctx);
  int concurrency() const override { return pool_->NumThreads(); }
  void Schedule(std::function<void()> task) override { pool_->Schedule(std::move(task)); }

 private:
  tensorflow::thread::ThreadPool* pool_;
};

// A kernel that shares its work among threads by itself. One that is expensive TensorFlow hands to
// another thread first, which takes longer to wake than a small layer to compute.
class ParallelKernel : public tensorflow::OpKernel {
 public:
  using OpKernel::OpKernel;
  bool IsExpensive() override { return false; }
};

absl::Status CopyOnHost(tensorflow::OpKernelContext* ctx, void* to, const void* from,
                        std::size_t bytes);

#if defined(ACCUMOPS_CUDA)
CUstream_st* CudaStream(tensorflow::OpKernelContext* ctx);
// Of the text that a launcher returned.
absl::Status FromCuda(const char* error);
absl::Status CopyOnDevice(tensorflow::OpKernelContext* ctx, void* to, const void* from,
                          std::size_t bytes);
#endif

}  // namespace accumops
