// Stands before TensorFlow's function that allocates memory on a CPU, and has one allocation fail.
//
// Only tensors count that operations ask for (OpKernelContext::allocate_tensor): these are the
// allocations that TensorFlow checks. It crashes where some of its other allocations fail, such as
// those within Eigen.

#include <dlfcn.h>
#include <execinfo.h>

#include <atomic>
#include <cstddef>
#include <new>

namespace {

constexpr char kAllocateTensor[] =
    "_ZN10tensorflow15OpKernelContext15allocate_tensorENS_8DataTypeERKNS_11TensorShapeEPNS_"
    "6TensorEN3tsl"
    "19AllocatorAttributesERKNS7_20AllocationAttributesE";
constexpr std::ptrdiff_t kLongest = 0x400;  // bytes of that function, at most
constexpr int kFrames = 24;

std::atomic<bool> counts{false};
std::atomic<long> counted{0};
std::atomic<long> left{-1};

bool IsForAnOperation() {
  static char* const begin = static_cast<char*>(dlsym(RTLD_DEFAULT, kAllocateTensor));
  void* frames[kFrames];
  const int depth = backtrace(frames, kFrames);
  for (int i = 0; i < depth; ++i) {
    char* const frame = static_cast<char*>(frames[i]);
    if (begin != nullptr && frame > begin && frame < begin + kLongest) return true;
  }
  return false;
}

}  // namespace

// Has the n-th allocation from now on fail, counted from 0; none if n is negative.
extern "C" void fail_allocation(long n) {
  counted = 0;
  left = n;
  counts = true;
}

// How many allocations there were since then.
extern "C" long allocations() { return counted; }

namespace tsl {
namespace port {

void* AlignedMalloc(std::size_t size, std::align_val_t alignment) {
  using Function = void* (*)(std::size_t, std::align_val_t);
  static const auto real =
      reinterpret_cast<Function>(dlsym(RTLD_NEXT, "_ZN3tsl4port13AlignedMallocEmSt11align_val_t"));
  if (counts && IsForAnOperation()) {
    ++counted;
    if (left >= 0 && left-- == 0) return nullptr;
  }
  return real(size, alignment);
}

}  // namespace port
}  // namespace tsl
