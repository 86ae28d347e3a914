// Tells the sanitizer that a build has, if any, what fibers and guarded memory it could not guess.
// The emulation itself is compiled without a sanitizer: only kernels are checked.
#pragma once

#include <cstddef>

#if defined(EMULATED_WITH_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMULATED_WITH_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#endif

namespace emulated {

// What a sanitizer knows about a fiber, or about the scheduler's own stack.
struct SanitizedStack {
  const void* bottom = nullptr;
  std::size_t bytes = 0;
  void* fake_stack = nullptr;
  void* fiber = nullptr;
};

#if defined(EMULATED_WITH_ADDRESS_SANITIZER)

// Called on the stack that is left, then on the stack that is entered.
inline void LeaveFor(SanitizedStack& from, const SanitizedStack& to) {
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
}
inline void Arrive(SanitizedStack& self, SanitizedStack& from) {
  __sanitizer_finish_switch_fiber(self.fake_stack, &from.bottom, &from.bytes);
}
inline void BeginScheduler(SanitizedStack&) {}
inline void MakeKnown(SanitizedStack& stack, const void* bottom, std::size_t bytes) {
  stack = {bottom, bytes, nullptr, nullptr};
}
inline void Guard(void* memory, std::size_t bytes) { __asan_poison_memory_region(memory, bytes); }
inline void Unguard(void* memory, std::size_t bytes) {
  __asan_unpoison_memory_region(memory, bytes);
}

#else

inline void Guard(void*, std::size_t) {}
inline void Unguard(void*, std::size_t) {}

#endif

#if defined(EMULATED_WITH_THREAD_SANITIZER)

constexpr bool kChecksOrder = true;
inline void LeaveFor(SanitizedStack&, const SanitizedStack& to) {
  __tsan_switch_to_fiber(to.fiber, __tsan_switch_to_fiber_no_sync);
}
inline void Arrive(SanitizedStack&, SanitizedStack&) {}
inline void BeginScheduler(SanitizedStack& self) { self.fiber = __tsan_get_current_fiber(); }
inline void MakeKnown(SanitizedStack& stack, const void*, std::size_t) {
  stack.fiber = __tsan_create_fiber(0);
}
inline void HappensBefore(void* moment) { __tsan_release(moment); }
inline void HappensAfter(void* moment) { __tsan_acquire(moment); }

#else

constexpr bool kChecksOrder = false;
inline void HappensBefore(void*) {}
inline void HappensAfter(void*) {}

#endif

#if !defined(EMULATED_WITH_ADDRESS_SANITIZER) && !defined(EMULATED_WITH_THREAD_SANITIZER)

inline void LeaveFor(SanitizedStack&, const SanitizedStack&) {}
inline void Arrive(SanitizedStack&, SanitizedStack&) {}
inline void BeginScheduler(SanitizedStack&) {}
inline void MakeKnown(SanitizedStack&, const void*, std::size_t) {}

#endif

}  // namespace emulated
