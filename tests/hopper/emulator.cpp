// A host that runs Hopper's kernels, in order to find their mistakes.
//
// Each CUDA thread is a fiber, a stack of its own; one thread of the host switches between them at
// barriers, waits and shuffles, in an order that the seed chooses. What the chip does on its own is
// done as early or as late as the chip may: a copy lands, and a product is computed, somewhere
// between its start and the wait for it. Until then accumulators hold NaN. Shared memory starts out
// as NaN, too. Shared memory that TMA or wgmma touch after an ordinary write without fence_async()
// is an error: at each switch the emulator looks what the thread has written. A wrong order between
// ordinary accesses is found only if some seed brings it about, so tests try several.
//
// What it does not know: time, caches, banks, weak memory order between blocks, clusters.
//
// Here: who runs when. emulator_block.cpp: what the threads of a block share. emulator_tma.cpp:
// copies. emulator_wgmma.cpp: products.

// Its longjmp takes a switch to another stack for an error.
#undef _FORTIFY_SOURCE

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#include "emulator_state.h"

namespace fusedformer {
namespace emulator {

Fiber* current = nullptr;
Launch launch;
std::vector<std::unique_ptr<Task>> tasks;

namespace {

constexpr size_t kStackBytes = 256 * 1024, kPageBytes = 4096;
constexpr int kSpinLimit = 100000, kSpinsUntilStuck = 1000;
constexpr size_t kSharedLimit = 227 * 1024;
constexpr int kRegisterFile = 64 * 1024;

jmp_buf scheduler;
const std::function<void()>* kernel = nullptr;
std::deque<Fiber*> runnable;
std::string error;
uint64_t random_state;
int spins;  // of load_acquire, since anything else happened
// The order in which threads take turns, and how soon tasks are done.
enum Policy { kUniform, kNewestFirst, kOldestFirst } policy;
uint32_t task_odds;

// Memory of the host that ends at a page nobody may touch, and begins after one.
class Pages {
 public:
  explicit Pages(size_t bytes) : bytes_((bytes + kPageBytes - 1) / kPageBytes * kPageBytes) {
    void* p = mmap(nullptr, bytes_ + 2 * kPageBytes, PROT_NONE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("emulator: out of memory");
    data_ = static_cast<unsigned char*>(p) + kPageBytes;
    mprotect(data_, bytes_, PROT_READ | PROT_WRITE);
  }
  Pages(const Pages&) = delete;
  ~Pages() { munmap(data_ - kPageBytes, bytes_ + 2 * kPageBytes); }
  unsigned char* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  size_t bytes_;
  unsigned char* data_;
};

uint64_t next_random() {  // splitmix64
  uint64_t z = random_state += 0x9E3779B97F4A7C15;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

void back_to_scheduler() {
  look_at_writes();
  if (_setjmp(current->state) == 0) _longjmp(scheduler, 1);
}

void yield() {
  if (policy == kNewestFirst)
    runnable.push_front(current);
  else
    runnable.push_back(current);
  back_to_scheduler();
}

void fiber_main() {
  (*kernel)();
  look_at_writes();
  check_thread_end(*current);
  current->finished = true;
  if (--current->block->alive == 0) check_block_end(*current->block);
  _longjmp(scheduler, 1);
}

void resume(Fiber* fiber) {
  current = fiber;
  if (_setjmp(scheduler) == 0) {
    if (fiber->started) _longjmp(fiber->state, 1);
    fiber->started = true;
    setcontext(&fiber->start);
  }
  current = nullptr;
  if (!error.empty()) throw std::runtime_error(error);
}

Fiber* take_runnable() {
  if (policy == kUniform)
    std::swap(runnable[random_below(static_cast<uint32_t>(runnable.size()))], runnable.back());
  Fiber* fiber = policy == kOldestFirst ? runnable.front() : runnable.back();
  if (policy == kOldestFirst)
    runnable.pop_front();
  else
    runnable.pop_back();
  return fiber;
}

void step_a_task() {
  // Chosen by lot they would all get on alike; the newest first, some are left far behind.
  const uint32_t count = static_cast<uint32_t>(tasks.size());
  uint32_t i = random_below(count);
  if (policy != kUniform) i = policy == kNewestFirst ? count - 1 : 0;
  Block* block = tasks[i]->block;
  if (!tasks[i]->step()) return;
  --block->tasks;
  tasks.erase(tasks.begin() + i);
}

// A fault in a thread of the kernel: there is no way back, but a word of where.
void say_where(int signal, siginfo_t* info, void*) {
  const std::string where = current ? name(*current) : "the emulator";
  fprintf(stderr, "emulator: signal %d in %s, address %p", signal, where.c_str(), info->si_addr);
  if (current)
    fprintf(stderr, " (byte %td of its %zu of shared memory)",
            static_cast<unsigned char*>(info->si_addr) - current->block->shared,
            launch.shared_bytes);
  fprintf(stderr, "\n");
  _exit(3);
}

void catch_faults() {
  static unsigned char stack[64 * 1024];
  stack_t alternative{};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof stack;
  sigaltstack(&alternative, nullptr);
  struct sigaction action {};
  action.sa_sigaction = say_where;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

std::string deadlock(const std::list<Block>& blocks) {
  std::string report = "deadlock; threads wait for:";
  for (const Block& block : blocks) {
    for (size_t i = 0; i < block.fibers.size();) {
      const Fiber& first = block.fibers[i];
      size_t last = i;
      auto state = [](const Fiber& f) -> std::string {
        return f.finished ? "(ended)" : f.waiting ? f.waiting() : "(could go on)";
      };
      while (last + 1 < block.fibers.size() && last + 1 < (i / 32 + 1) * 32 &&
             state(block.fibers[last + 1]) == state(first))
        ++last;
      report += text("\n  block %d warp %d lanes %d to %d: ", block.index, static_cast<int>(i / 32),
                     static_cast<int>(i % 32), static_cast<int>(last % 32)) +
                state(first);
      i = last + 1;
    }
  }
  return report;
}

class Stage {  // the blocks that are resident, and their memory
 public:
  Stage() {
    for (int i = 0; i < launch.resident; ++i) {
      shared_.emplace_back(std::max<size_t>(launch.shared_bytes, 1));
      stacks_.emplace_back(kStackBytes * launch.threads);
      free_.push_back(i);
    }
  }

  std::list<Block>& blocks() { return blocks_; }
  bool has_room() const { return !free_.empty(); }

  void start(int index) {
    const int slot = free_.back();
    free_.pop_back();
    blocks_.emplace_back();
    Block& block = blocks_.back();
    slots_[&block] = slot;
    block.index = index;
    block.alive = launch.threads;
    block.shared = shared_[slot].data();
    memset(block.shared, 0xFF, shared_[slot].size());
    block.seen.assign(shared_[slot].size(), 0xFF);
    block.writer.assign(shared_[slot].size() / 16, kNobody);
    block.warps = std::vector<WarpState>(launch.threads / 32);
    block.warpgroups = std::vector<Warpgroup>((launch.threads + 127) / 128);
    block.warp_registers.assign(launch.threads / 32, launch.registers);
    block.free_registers = 0;  // setmaxnreg deals with those that the block was launched with
    block.fibers = std::vector<Fiber>(launch.threads);
    for (int t = 0; t < launch.threads; ++t) {
      Fiber& fiber = block.fibers[t];
      fiber.thread = t;
      fiber.block = &block;
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = stacks_[slot].data() + t * kStackBytes;
      fiber.start.uc_stack.ss_size = kStackBytes;
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, fiber_main, 0);
      runnable.push_back(&fiber);
    }
  }

  void remove_finished() {
    for (auto block = blocks_.begin(); block != blocks_.end();) {
      if (block->alive || block->tasks) {
        ++block;
        continue;
      }
      free_.push_back(slots_[&*block]);
      slots_.erase(&*block);
      block = blocks_.erase(block);
    }
  }

 private:
  std::deque<Pages> shared_, stacks_;
  std::vector<int> free_;
  std::list<Block> blocks_;
  std::map<Block*, int> slots_;
};

}  // namespace

uint32_t random_below(uint32_t limit) {
  return static_cast<uint32_t>((next_random() >> 32) * limit >> 32);
}

std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

std::string name(const Fiber& fiber) {
  return text("block %d thread %d (warp %d lane %d)", fiber.block->index, fiber.thread,
              fiber.thread / 32, fiber.thread % 32);
}

void fail_anywhere(const std::string& what) {
  if (!current) throw std::runtime_error(what);
  error = name(*current) + ": " + what;
  _longjmp(scheduler, 1);
}

void fail(const std::string& what) { fail_anywhere(what); }

void start_task(std::unique_ptr<Task> task) {
  task->block = current->block;
  ++task->block->tasks;
  tasks.push_back(std::move(task));
}

void sleep_on(Event& event, std::function<std::string()> waiting) {
  current->waiting = std::move(waiting);
  event.sleepers.push_back(current);
  back_to_scheduler();
  current->waiting = nullptr;
}

void wake(Event& event) {
  spins = 0;
  runnable.insert(runnable.end(), event.sleepers.begin(), event.sleepers.end());
  event.sleepers.clear();
}

void maybe_switch() {
  if (random_below(4) == 0) yield();
}

int load_acquire(const int* global) {
  ++spins;
  current->waiting = [global] {
    return text("load_acquire(%p), which is %d", static_cast<const void*>(global), *global);
  };
  yield();
  current->waiting = nullptr;
  return *global;
}

void run(const Launch& requested, const std::function<void()>& function) {
  launch = requested;
  if (launch.threads <= 0 || launch.threads % 32 || launch.threads > 1024)
    throw std::runtime_error("emulator: threads must be a multiple of 32, up to 1024");
  if (launch.shared_bytes > kSharedLimit)
    throw std::runtime_error(text("emulator: %zu bytes of shared memory; a block has at most %zu",
                                  launch.shared_bytes, kSharedLimit));
  if (!launch.registers)
    launch.registers = std::min(kRegisterFile / launch.threads / 8 * 8, 248);
  kernel = &function;
  random_state = launch.seed;
  policy = static_cast<Policy>(random_below(3));
  const uint32_t odds[] = {2, 64, 1 << 14};  // at once, some time, when nobody can go on
  task_odds = odds[random_below(3)];
  runnable.clear();
  tasks.clear();
  error.clear();
  spins = 0;

  catch_faults();
  Stage stage;
  int next = 0;
  while (next < launch.grid || !stage.blocks().empty()) {
    while (next < launch.grid && stage.has_room()) stage.start(next++);
    if (runnable.empty() && tasks.empty()) throw std::runtime_error(deadlock(stage.blocks()));
    if (spins > kSpinLimit)
      throw std::runtime_error("load_acquire() was called in vain; " + deadlock(stage.blocks()));
    // Threads that do nothing but call load_acquire() cannot go on, either.
    const bool stuck = runnable.empty() || spins > kSpinsUntilStuck;
    if (!tasks.empty() && (stuck || random_below(task_odds) == 0)) step_a_task();
    if (!runnable.empty()) resume(take_runnable());
    stage.remove_finished();
  }
}

}  // namespace emulator
}  // namespace fusedformer
