#include <atomic>
#include <cstring>
#include <initializer_list>

#include "batch_norm_span.h"
#include "clip_span.h"
#include "span.h"
#include "update_span.h"

namespace accumops {
namespace {

const SpanFunctions* Find(const char* name) {
#if defined(ACCUMOPS_X86)
  if (std::strcmp(name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? &avx512::kSpanFunctions
               : nullptr;
  }
  if (std::strcmp(name, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") ? &avx2::kSpanFunctions
                                                                            : nullptr;
  }
#endif
  return std::strcmp(name, "baseline") == 0 ? &baseline::kSpanFunctions : nullptr;
}

const SpanFunctions* Widest() {
  for (const char* name : {"avx512", "avx2"}) {
    if (const SpanFunctions* functions = Find(name)) return functions;
  }
  return &baseline::kSpanFunctions;
}

std::atomic<const SpanFunctions*>& Current() {
  static std::atomic<const SpanFunctions*> current{Widest()};
  return current;
}

}  // namespace

const SpanFunctions& CurrentSpanFunctions() { return *Current().load(std::memory_order_relaxed); }

const BatchNormSpanFunctions& CurrentBatchNormSpanFunctions() {
  return *CurrentSpanFunctions().batch_norm;
}

const ClipSpanFunctions& CurrentClipSpanFunctions() { return *CurrentSpanFunctions().clip; }

const UpdateSpanFunctions& CurrentUpdateSpanFunctions() { return *CurrentSpanFunctions().update; }

bool UseInstructionSet(const char* name) {
  const SpanFunctions* functions = Find(name);
  if (functions == nullptr) return false;
  Current().store(functions, std::memory_order_relaxed);
  return true;
}

}  // namespace accumops
