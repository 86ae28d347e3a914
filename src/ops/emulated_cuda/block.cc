#include "block.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "sanitizers.h"

namespace emulated {
namespace {

constexpr std::size_t kStackBytes = 128 << 10;
constexpr unsigned kMaxThreads = 1024;          // of a block
constexpr std::size_t kSharedBytes = 48 << 10;  // as many as CUDA gives without being asked
constexpr std::size_t kGuardBytes = 64;

enum class State { kReady, kAtBarrier, kAtWarpOperation, kEnded };

// A stack, and where on it to go on. The builtins save no signal mask, so that a switch costs no
// call of the kernel.
struct Context {
  void* registers[5];
};

struct Fiber {
  Context context;
  ucontext_t start;
  void* stack = nullptr;
  bool started = false;
  uint3 index{};
  State state = State::kReady;
  WarpOperation operation{};
  unsigned mask = 0;
  std::uint64_t value = 0;
  std::uint64_t lanes[kWarpSize];
  SanitizedStack sanitized;
};

struct SharedVariable {
  const void* key;
  void* memory;
};

// What runs now. One grid runs at a time: see EnqueueGrid().
const char* kernel_name = "";
uint3 block_index, grid_size;
const std::function<void()>* thread_body = nullptr;
std::vector<Fiber*> fibers;  // of the block, by thread
Fiber* current = nullptr;
Context scheduler;
SanitizedStack scheduler_sanitized;
std::vector<SharedVariable> shared_variables;
char* shared_memory = nullptr;
std::size_t shared_used = 0;
std::mt19937 random_engine(1);
// Addresses that stand for the moments at which threads wait for one another.
char block_begins, block_ends, barriers[2];
unsigned barrier = 0;

[[noreturn]] void Die(const char* what) {
  std::fprintf(stderr, "ERROR: emulated CUDA: %s, in block %u, thread %u of %s\n", what,
               block_index.x, current == nullptr ? 0 : current->index.x, kernel_name);
  std::abort();
}

[[noreturn]] __attribute__((noinline)) void Jump(Context& to) {
  __builtin_longjmp(to.registers, 1);
}

__attribute__((noinline)) void Switch(Context& from, Context& to) {
  if (__builtin_setjmp(from.registers) == 0) Jump(to);
}

void ToScheduler() {
  Fiber& self = *current;
  LeaveFor(self.sanitized, scheduler_sanitized);
  Switch(self.context, scheduler);
  Arrive(self.sanitized, scheduler_sanitized);
}

void FiberMain() {
  Fiber& self = *current;
  Arrive(self.sanitized, scheduler_sanitized);
  HappensAfter(&block_begins);
  (*thread_body)();
  HappensBefore(&block_ends);
  self.state = State::kEnded;
  ToScheduler();
}

__attribute__((noinline)) void StartOrResume(Fiber& fiber) {
  if (fiber.started) {
    Switch(scheduler, fiber.context);
  } else if (__builtin_setjmp(scheduler.registers) == 0) {
    fiber.started = true;
    setcontext(&fiber.start);
  }
}

void Resume(Fiber& fiber) {
  current = &fiber;
  LeaveFor(scheduler_sanitized, fiber.sanitized);
  StartOrResume(fiber);
  Arrive(scheduler_sanitized, fiber.sanitized);
  current = nullptr;
}

// A fiber keeps its stack, and its identity for the sanitizer.
std::unique_ptr<Fiber> MakeFiber() {
  auto fiber = std::make_unique<Fiber>();
  void* const stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) Die("there is no memory for a thread's stack");
  fiber->stack = stack;
  MakeKnown(fiber->sanitized, stack, kStackBytes);
  return fiber;
}

// Gives a block its fibers. Where the order of accesses is checked, blocks that follow one another
// have different ones: a fiber that served two blocks would order them.
void TakeFibers(unsigned threads) {
  static std::vector<std::unique_ptr<Fiber>> all;
  static unsigned next = 0;
  constexpr unsigned kFibers = kChecksOrder ? 3 * kMaxThreads : kMaxThreads;
  if (!kChecksOrder || next + threads > kFibers) next = 0;
  fibers.clear();
  for (unsigned i = 0; i < threads; ++i, ++next) {
    if (next == all.size()) all.push_back(MakeFiber());
    Fiber& fiber = *all[next];
    fiber.index = {i, 0, 0};
    fiber.state = State::kReady;
    fiber.started = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack;
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, FiberMain, 0);
    Unguard(fiber.stack, kStackBytes);
    fibers.push_back(&fiber);
  }
}

// Lets the lanes that wait with `fiber` go on, if all lanes of its mask are there.
void TryExchange(unsigned index, unsigned threads, std::vector<unsigned>& ready) {
  const Fiber& fiber = *fibers[index];
  const unsigned first = index / kWarpSize * kWarpSize;
  bool complete = true;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (!(fiber.mask >> lane & 1)) continue;
    if (first + lane >= threads) Die("a warp operation's mask has a lane that does not exist");
    const Fiber& other = *fibers[first + lane];
    if (other.state == State::kEnded) Die("a lane of a warp operation's mask has ended");
    if (other.state == State::kAtBarrier) {
      Die("a lane of a warp operation's mask waits at __syncthreads()");
    }
    if (other.state != State::kAtWarpOperation) {
      complete = false;
    } else if (other.operation != fiber.operation || other.mask != fiber.mask) {
      Die("lanes of one mask call different warp operations");
    }
  }
  if (!complete) return;
  std::uint64_t values[kWarpSize] = {};
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (fiber.mask >> lane & 1) values[lane] = fibers[first + lane]->value;
  }
  for (unsigned lane = 0, mask = fiber.mask; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Fiber& other = *fibers[first + lane];
    std::copy(values, values + kWarpSize, other.lanes);
    other.state = State::kReady;
    ready.push_back(first + lane);
  }
}

// Runs threads until none can go on. Returns how many wait at the barrier.
unsigned RunReady(unsigned threads, std::vector<unsigned>& ready, unsigned& ended) {
  unsigned waiting = 0;
  while (!ready.empty()) {
    std::swap(ready[random_engine() % ready.size()], ready.back());
    const unsigned index = ready.back();
    ready.pop_back();
    Resume(*fibers[index]);
    switch (fibers[index]->state) {
      case State::kEnded:
        ++ended;
        break;
      case State::kAtBarrier:
        ++waiting;
        break;
      case State::kAtWarpOperation:
        TryExchange(index, threads, ready);
        break;
      case State::kReady:
        Die("a thread stopped without a reason");
    }
  }
  return waiting;
}

void RunBlock(unsigned threads) {
  TakeFibers(threads);
  std::vector<unsigned> ready(threads);
  std::iota(ready.begin(), ready.end(), 0u);
  for (unsigned ended = 0; ended < threads;) {
    const unsigned waiting = RunReady(threads, ready, ended);
    if (ended == threads) break;
    if (waiting + ended < threads) Die("not all lanes of a mask reach a warp operation");
    if (ended != 0) Die("some threads wait at __syncthreads(), others have ended");
    barrier ^= 1;
    for (unsigned i = 0; i < threads; ++i) {
      fibers[i]->state = State::kReady;
      ready.push_back(i);
    }
  }
}

}  // namespace

const uint3& ThreadIndex() { return current->index; }
const uint3& BlockIndex() { return block_index; }
const uint3& GridSize() { return grid_size; }

// A thread must not leave one barrier and find the next one's address already taken: two addresses
// take turns.
void SyncThreads() {
  char* const here = &barriers[barrier];
  HappensBefore(here);
  current->state = State::kAtBarrier;
  ToScheduler();
  HappensAfter(here);
}

const std::uint64_t* Exchange(WarpOperation operation, unsigned mask, std::uint64_t value) {
  Fiber& self = *current;
  if (!(mask >> (self.index.x % kWarpSize) & 1)) Die("a lane calls with a mask that lacks it");
  self.operation = operation;
  self.mask = mask;
  self.value = value;
  self.state = State::kAtWarpOperation;
  ToScheduler();
  return self.lanes;
}

void* SharedMemory(const void* key, std::size_t bytes, std::size_t alignment) {
  for (const SharedVariable& each : shared_variables) {
    if (each.key == key) return each.memory;
  }
  shared_used = (shared_used + alignment - 1) / alignment * alignment;
  void* const memory = shared_memory + shared_used;
  shared_used += bytes;
  if (shared_used > kSharedBytes) Die("more than 48 KiB of shared memory");
  Unguard(memory, bytes);
  shared_used += kGuardBytes;
  shared_variables.push_back({key, memory});
  return memory;
}

// Each block has shared memory of its own until the grid has ended: blocks are not ordered, so
// memory that one block freed for another would look like a race.
void RunGrid(const char* name, unsigned blocks, unsigned threads,
             const std::function<void()>& thread) {
  constexpr std::size_t kBytes = kSharedBytes + 64 * kGuardBytes;
  struct Free {
    void operator()(char* memory) const {
      Unguard(memory, kBytes);
      std::free(memory);
    }
  };
  std::vector<std::unique_ptr<char, Free>> memory_of_blocks;
  kernel_name = name;
  grid_size = {blocks, 1, 1};
  thread_body = &thread;
  BeginScheduler(scheduler_sanitized);
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_engine);
  for (const unsigned block : order) {
    block_index = {block, 0, 0};
    shared_memory = static_cast<char*>(std::aligned_alloc(kGuardBytes, kBytes));
    if (shared_memory == nullptr) Die("there is no memory for a block's shared memory");
    memory_of_blocks.emplace_back(shared_memory);
    std::memset(shared_memory, 0xFF, kBytes);
    Guard(shared_memory, kBytes);
    shared_used = kGuardBytes;
    shared_variables.clear();
    HappensBefore(&block_begins);
    RunBlock(threads);
  }
  HappensAfter(&block_ends);
  thread_body = nullptr;
  kernel_name = "";
}

void SeedBlocks(unsigned seed) { random_engine.seed(seed); }

}  // namespace emulated
