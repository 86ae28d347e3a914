#include "parallel_for.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>

namespace accumops {
namespace {

constexpr std::chrono::microseconds kPatience(50);

void Pause() {
#if defined(ACCUMOPS_X86)
  __builtin_ia32_pause();
#endif
}

// Shared with the helpers, which may start after the loop has ended and the caller has gone on.
struct Loop {
  std::int64_t count;
  const std::function<void(std::int64_t)>* body;  // alive while an index below `count` is unclaimed
  std::atomic<std::int64_t> next{0};
  std::atomic<std::int64_t> done{0};
  std::mutex mutex;
  std::condition_variable finished;

  void Work() {
    std::int64_t completed = 0;
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count; ++completed) {
      (*body)(i);
    }
    if (completed > 0 &&
        done.fetch_add(completed, std::memory_order_acq_rel) + completed == count) {
      std::lock_guard<std::mutex> lock(mutex);
      finished.notify_all();
    }
  }
};

}  // namespace

void ParallelFor(Executor& executor, std::int64_t count,
                 const std::function<void(std::int64_t)>& body) {
  const std::int64_t helpers = std::min<std::int64_t>(executor.concurrency(), count) - 1;
  if (helpers <= 0) {
    for (std::int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  auto loop = std::make_shared<Loop>();
  loop->count = count;
  loop->body = &body;
  try {
    for (std::int64_t i = 0; i < helpers; ++i) executor.Schedule([loop] { loop->Work(); });
  } catch (const std::bad_alloc&) {
    // Helpers that were scheduled refer to `body`, so the loop has to end before this returns.
  }
  loop->Work();
  // Waits for the indices that helpers have claimed, not for helpers that never got to start. Most
  // helpers are about to be done: first the thread spins, as sleeping and waking would take longer.
  const auto give_up = std::chrono::steady_clock::now() + kPatience;
  while (loop->done.load(std::memory_order_acquire) != count &&
         std::chrono::steady_clock::now() < give_up) {
    Pause();
  }
  std::unique_lock<std::mutex> lock(loop->mutex);
  loop->finished.wait(lock, [&] { return loop->done.load(std::memory_order_acquire) == count; });
}

}  // namespace accumops
