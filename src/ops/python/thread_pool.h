// The threads that the Python module's kernels run on: one pool a process, started when it is first
// needed and never stopped. Its threads touch no Python object, so they may outlive the
// interpreter; a forked child, in which they do not exist, starts its own.
#pragma once

#include <functional>

#include "parallel_for.h"

namespace accumops {

// The processors that this process may run on.
int AvailableThreads();

// Runs one call's loops on the pool, with at most `threads` threads, the calling one included.
class PoolExecutor final : public Executor {
 public:
  explicit PoolExecutor(int threads);

  int concurrency() const override { return threads_; }
  void Schedule(std::function<void()> task) override;

 private:
  int threads_;
};

}  // namespace accumops
