// What the calls of all kernels share: numbers and flags as Python passes them, and the way from
// checked arrays to a launcher, without the GIL.
#pragma once

#include <cstdint>
#include <exception>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "array.h"
#include "thread_pool.h"

#if defined(ACCUMOPS_CUDA)
#include "cuda_call.h"
#endif

namespace accumops {

// Takes the GIL back. Does not return where the interpreter is exiting.
void RestoreGil(PyThreadState* state);

template <typename Body>
void WithoutGil(const Body& body) {
  PyThreadState* const state = PyEval_SaveThread();
  std::exception_ptr exception;
  try {
    body();
  } catch (...) {
    exception = std::current_exception();
  }
  RestoreGil(state);
  if (exception) std::rethrow_exception(exception);
}

// The number of threads that the argument `threads` asks for: None is one for each processor.
int ThreadCount(py::handle threads);
double ToNumber(py::handle object, const char* argument, const char* expected = "a number");
// The value of an argument that must be finite and at least 0.
double ToMagnitude(py::handle object, const char* argument);
[[noreturn]] void WrongType(const char* argument, const char* expected, py::handle got);
void RequireLength(const char* argument, std::size_t length, std::size_t expected,
                   const char* because);

// The items of a sequence that is no text. They are kept alive: those of an array or a range are
// made when they are read.
std::vector<py::object> ToObjects(py::handle object, const char* argument, const char* expected);

// A scalar of a call: a number, or for CUDA arrays one element of device memory.
struct Scalar {
  double value = 0;
  std::optional<Array> array;

  Scalar(py::handle object, const char* argument, std::initializer_list<Element> allowed,
         const char* description);
};

// A flag of a call: a bool, or for CUDA arrays one element of device memory.
struct Flag {
  bool value = false;
  std::optional<Array> array;

  Flag(py::handle object, const char* argument);
};

// A writable bool of one element, or none.
std::optional<Array> ToAllFinite(py::handle object);

inline const Array* Pointer(const std::optional<Array>& array) { return array ? &*array : nullptr; }

inline bool* Flags(const Array* array) {
  return array == nullptr ? nullptr : reinterpret_cast<bool*>(array->data);
}

// One call of a kernel: the arrays that it reads and writes, and where it runs.
class Call {
 public:
  Call(py::handle threads, std::uintptr_t stream)
      : threads_(ThreadCount(threads)), stream_(stream) {}

  // They throw where an array cannot be read, or written. It must live until Run() is done.
  void Read(const Array& array);
  void Write(const Array& array);
  // Reads a scalar, where it is an array.
  void ReadScalar(const std::optional<Array>& array);

  // Checks what concerns all arrays together and runs cpu(executor) or cuda(CudaCall&), which
  // returns an error's text or null. `cuda` is generic: a build without CUDA does not instantiate
  // it.
  template <typename Cpu, typename Cuda>
  void Run(const Cpu& cpu, const Cuda& cuda) const {
    const std::vector<const Array*> all = CheckTogether();
    if (all.empty() || !all.front()->on_device) {
      PoolExecutor executor(threads_);
      WithoutGil([&] { cpu(executor); });
      return;
    }
#if defined(ACCUMOPS_CUDA)
    WithoutGil([&] {
      CudaCall call(all, stream_);
      call.Start(all);
      const char* error = cuda(call);
      if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
      call.Finish();
    });
#else
    (void)cuda, (void)stream_;
    throw std::runtime_error(all.front()->name.str() +
                             " is in CUDA memory, but this build of accumops has no CUDA kernels; "
                             "pass NumPy arrays, or build where nvcc is installed");
#endif
  }

 private:
  std::vector<const Array*> CheckTogether() const;

  std::vector<const Array*> written_, read_;
  int threads_;
  std::uintptr_t stream_;
};

// The memory that a CUDA kernel works in: the caller's, or the call's own.
class Workspace {
 public:
  explicit Workspace(py::handle object);

  // Adds the caller's memory to what the call writes.
  void AddTo(Call& call) const {
    if (array_) call.Write(*array_);
  }

  // Throws ValueError where there is less than `bytes`.
  template <typename On>
  void* Place(On& on, std::int64_t bytes) const {
    if (!array_) return on.Allocate(static_cast<std::size_t>(bytes));
    RequireBytes(bytes);
    return array_->data;
  }

 private:
  void RequireBytes(std::int64_t bytes) const;

  std::optional<Array> array_;
};

}  // namespace accumops
