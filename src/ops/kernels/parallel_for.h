// Splits a loop over the threads of an executor: TensorFlow's pool inside an op, this library's own
// pool elsewhere.
#pragma once

#include <cstdint>
#include <functional>

namespace accumops {

class Executor {
 public:
  virtual ~Executor() = default;
  // How many threads may work at once, the calling one included.
  virtual int concurrency() const = 0;
  // Runs `task` on another thread, now or later.
  virtual void Schedule(std::function<void()> task) = 0;
};

// Calls body(0) … body(count - 1), each once, in no fixed order, and returns when all are done. The
// calling thread takes part, so this makes progress even where every other thread is busy.
void ParallelFor(Executor& executor, std::int64_t count,
                 const std::function<void(std::int64_t)>& body);

}  // namespace accumops
