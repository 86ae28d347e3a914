#include "thread_pool.h"

#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace accumops {
namespace {

// Nothing gains from more, and a mistyped number must not exhaust the system.
constexpr int kMaxThreads = 1024;

class Pool {
 public:
  // Never destroyed: its threads still wait on it while the process exits.
  static Pool& Instance() {
    static std::atomic<Pool*> instance{nullptr};
    Pool* pool = instance.load(std::memory_order_acquire);
    const pid_t process = getpid();
    while (pool == nullptr || pool->process_ != process) {
      // A pool from before a fork is left alone: its mutex may be locked by a thread that is gone.
      Pool* fresh = new Pool(process);
      if (instance.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) return *fresh;
      delete fresh;
    }
    return *pool;
  }

  // Where the system refuses every thread the task is dropped: the caller of ParallelFor does the
  // work of a helper that never starts.
  void Submit(std::function<void()> task, int workers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < workers && StartWorker()) ++workers_;
      if (workers_ == 0) return;
      tasks_.push_back(std::move(task));
    }
    available_.notify_one();
  }

 private:
  explicit Pool(pid_t process) : process_(process) {}

  bool StartWorker() {
    // A thread inherits the mask: signals are for the threads that Python knows.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = true;
    try {
      std::thread(&Pool::Work, this).detach();
    } catch (const std::system_error&) {
      started = false;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started;
  }

  [[noreturn]] void Work() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        available_.wait(lock, [this] { return !tasks_.empty(); });
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      task();
    }
  }

  const pid_t process_;
  std::mutex mutex_;
  std::condition_variable available_;
  std::deque<std::function<void()>> tasks_;
  int workers_ = 0;
};

}  // namespace

int AvailableThreads() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return std::max(1, CPU_COUNT(&allowed));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

PoolExecutor::PoolExecutor(int threads) : threads_(std::clamp(threads, 1, kMaxThreads)) {}

void PoolExecutor::Schedule(std::function<void()> task) {
  Pool::Instance().Submit(std::move(task), threads_ - 1);
}

}  // namespace accumops
