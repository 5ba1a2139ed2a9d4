// A host that runs Hopper's kernels, in order to find their mistakes.
//
// Each CUDA thread is a fiber, a stack of its own; one thread of the host switches between them at
// barriers, waits and shuffles, in an order that the seed chooses. What the chip does on its own is
// done as early or as late as the chip may: a copy lands, and a product is computed, somewhere
// between its start and the wait for it. Until then accumulators hold NaN. Shared memory starts out
// as NaN, too. Shared memory that TMA or wgmma touch after an ordinary write without fence_async()
// is an error: at each switch the emulator looks what the thread has written.
//
// This file: threads, barriers, shared memory. emulator_tma.cpp: copies. emulator_wgmma.cpp: products.

// Its longjmp takes a switch to another stack for an error.
#undef _FORTIFY_SOURCE

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
std::vector<std::unique_ptr<Copy>> copies;

namespace {

constexpr size_t kStackBytes = 256 * 1024, kPageBytes = 4096;
constexpr int kSpinLimit = 1000000;
constexpr int kSharedLimit = 227 * 1024, kRegisterFile = 64 * 1024;

jmp_buf scheduler;
const std::function<void()>* kernel = nullptr;
std::deque<Fiber*> runnable;
std::string error;
uint64_t random_state;
int spins;  // of load_acquire, since anything else happened
// The order in which threads take turns, and how soon copies land.
enum Policy { kUniform, kNewestFirst, kOldestFirst } policy;
uint32_t copy_odds;

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
  --current->block->alive;
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

void step_a_copy() {
  const uint32_t i = random_below(static_cast<uint32_t>(copies.size()));
  Block* block = copies[i]->block;
  if (!copies[i]->step()) return;
  --block->copies;
  copies.erase(copies.begin() + i);
}

std::string deadlock(const std::list<Block>& blocks) {
  std::string report = "deadlock; threads wait for:";
  for (const Block& block : blocks) {
    for (size_t i = 0; i < block.fibers.size();) {
      const Fiber& first = block.fibers[i];
      size_t last = i;
      auto state = [](const Fiber& f) { return f.finished ? "(ended)" : f.waiting; };
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
    block.free_registers = kRegisterFile - launch.threads * launch.registers;
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
      if (block->alive || block->copies) {
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

void sleep_on(Event& event, std::string waiting) {
  current->waiting = std::move(waiting);
  event.sleepers.push_back(current);
  back_to_scheduler();
}

void wake(Event& event) {
  spins = 0;
  runnable.insert(runnable.end(), event.sleepers.begin(), event.sleepers.end());
  event.sleepers.clear();
}

void maybe_switch() {
  if (random_below(4) == 0) yield();
}

void run(const Launch& requested, const std::function<void()>& function) {
  launch = requested;
  if (launch.threads <= 0 || launch.threads % 32 || launch.threads > 1024)
    throw std::runtime_error("emulator: threads must be a multiple of 32, up to 1024");
  if (launch.shared_bytes > kSharedLimit)
    throw std::runtime_error(text("emulator: %zu bytes of shared memory; a block has at most %d",
                                  launch.shared_bytes, kSharedLimit));
  if (!launch.registers)
    launch.registers = std::min(kRegisterFile / launch.threads / 8 * 8, 248);
  kernel = &function;
  random_state = launch.seed;
  policy = static_cast<Policy>(random_below(3));
  const uint32_t odds[] = {2, 32, 1024};
  copy_odds = odds[random_below(3)];
  runnable.clear();
  copies.clear();
  error.clear();
  spins = 0;

  Stage stage;
  int next = 0;
  while (next < launch.grid || !stage.blocks().empty()) {
    while (next < launch.grid && stage.has_room()) stage.start(next++);
    if (runnable.empty() && copies.empty()) throw std::runtime_error(deadlock(stage.blocks()));
    if (spins > kSpinLimit)
      throw std::runtime_error("load_acquire() was called in vain; " + deadlock(stage.blocks()));
    if (!copies.empty() && (runnable.empty() || random_below(copy_odds) == 0)) step_a_copy();
    if (!runnable.empty()) resume(take_runnable());
    stage.remove_finished();
  }
}

// ---- Threads -------------------------------------------------------------------------------

int thread_index() { return current->thread; }
int block_index() { return current->block->index; }
int block_size() { return launch.threads; }
int grid_size() { return launch.grid; }
int leader_lane() { return static_cast<int>((launch.seed * 2654435761u >> 7) % 32); }

void warp_barrier(const char* what) {
  WarpState& warp = current->block->warps[current->thread / 32];
  const uint64_t generation = warp.generation;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
    wake(warp.event);
    return;
  }
  while (warp.generation == generation)
    sleep_on(warp.event, text("the rest of its warp at %s", what));
}

const uint64_t* warp_exchange(uint64_t word, const char* what) {
  WarpState& warp = current->block->warps[current->thread / 32];
  // Two sets: a lane that is ahead writes into the other.
  uint64_t* words = warp.words[current->parity];
  current->parity ^= 1;
  words[current->thread % 32] = word;
  warp_barrier(what);
  return words;
}

namespace {

NamedBarrier& arrive(int id, int threads) {
  if (id < 0 || id > 15 || threads <= 0 || threads % 32 || threads > launch.threads)
    fail(text("barrier %d of %d threads does not exist", id, threads));
  NamedBarrier& barrier = current->block->barriers[id];
  if (barrier.arrived && barrier.threads != threads)
    fail(text("barrier %d: %d threads, where others said %d", id, threads, barrier.threads));
  barrier.threads = threads;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    wake(barrier.event);
  }
  return barrier;
}

}  // namespace

void barrier_sync(int id, int threads) {
  const uint64_t generation = current->block->barriers[id & 15].generation;
  NamedBarrier& barrier = arrive(id, threads);
  while (barrier.generation == generation)
    sleep_on(barrier.event, text("barrier %d of %d threads", id, threads));
}

void barrier_arrive(int id, int threads) {
  arrive(id, threads);
  maybe_switch();
}

void set_registers(int count, bool up) {
  warp_barrier("setmaxnreg");
  Block& block = *current->block;
  int& mine = block.warp_registers[current->thread / 32];
  if (current->thread % 32 == 0) {
    if (up ? count < mine : count > mine)
      fail(text("setmaxnreg: from %d registers %s to %d", mine, up ? "up" : "down", count));
    while (block.free_registers < (count - mine) * 32)
      sleep_on(block.registers_event, text("%d registers", count));
    block.free_registers -= (count - mine) * 32;
    mine = count;
    wake(block.registers_event);
  }
  warp_barrier("setmaxnreg");
}

int load_acquire(const int* global) {
  ++spins;
  current->waiting = text("load_acquire(%p), which is %d", static_cast<const void*>(global), *global);
  yield();
  return *global;
}

// ---- Shared memory -------------------------------------------------------------------------

unsigned char* shared_memory() { return current->block->shared; }

uint32_t shared_offset(const void* shared, const char* what) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(shared) - current->block->shared;
  if (offset < 0 || static_cast<size_t>(offset) > launch.shared_bytes)
    fail(text("%s: %p is not in shared memory", what, shared));
  return static_cast<uint32_t>(offset);
}

uint32_t shared_address(const void* shared) {
  return shared_offset(shared, "shared_address") + kSharedBase;
}

unsigned char* shared_bytes(Block& block, uint32_t offset, size_t size, const char* what) {
  if (offset + size > launch.shared_bytes)
    fail_anywhere(text("%s: bytes %u to %zu of shared memory, which has %zu", what, offset,
                       offset + size, launch.shared_bytes));
  return block.shared + offset;
}

void look_at_writes() {
  if (!launch.check_fences) return;
  Block& block = *current->block;
  unsigned char* seen = block.seen.data();
  constexpr size_t kStep = 1024;
  if (memcmp(seen, block.shared, block.seen.size()) == 0) return;
  for (size_t chunk = 0; chunk < block.seen.size(); chunk += kStep) {
    if (memcmp(seen + chunk, block.shared + chunk, kStep) == 0) continue;
    for (size_t i = chunk; i < chunk + kStep; i += 16) {
      if (memcmp(seen + i, block.shared + i, 16) == 0) continue;
      if (i + 16 > (launch.shared_bytes + 15) / 16 * 16)
        fail(text("writes past its %zu bytes of shared memory", launch.shared_bytes));
      memcpy(seen + i, block.shared + i, 16);
      block.writer[i / 16] = current->thread;
      current->dirty.push_back(static_cast<int>(i / 16));
    }
  }
}

void fence_async() {
  look_at_writes();
  for (int granule : current->dirty)
    if (current->block->writer[granule] == current->thread)
      current->block->writer[granule] = kNobody;
  current->dirty.clear();
}

void check_fenced(Block& block, uint32_t offset, size_t size, const char* what) {
  if (!launch.check_fences) return;
  for (size_t granule = offset / 16; granule <= (offset + size - 1) / 16; ++granule)
    if (block.writer[granule] != kNobody)
      fail_anywhere(text("%s: byte %zu of shared memory, written by thread %d without fence_async()",
                         what, granule * 16, block.writer[granule]));
}

void write_shared(Block& block, uint32_t offset, const void* data, size_t size) {
  memcpy(block.shared + offset, data, size);
  memcpy(block.seen.data() + offset, data, size);
}

// ---- mbarriers -----------------------------------------------------------------------------

Mbarrier& find_mbarrier(Block& block, uint32_t offset, const char* what) {
  auto found = block.mbarriers.find(offset);
  if (found == block.mbarriers.end())
    fail_anywhere(text("%s: no mbarrier was initialised at byte %u of shared memory", what, offset));
  return found->second;
}

void settle(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  wake(barrier.event);
}

void mbarrier_init(uint64_t* barrier, int arrivals) {
  const uint32_t offset = shared_offset(barrier, "mbarrier_init");
  if (offset % 8 || arrivals < 1) fail("mbarrier_init: misaligned, or no arrivals");
  shared_bytes(*current->block, offset, 8, "mbarrier_init");
  if (current->block->mbarriers.count(offset)) fail("mbarrier_init: twice at one place");
  Mbarrier& made = current->block->mbarriers[offset];
  made.arrivals = made.pending = arrivals;
}

void mbarrier_init_fence() {
  for (auto& item : current->block->mbarriers) item.second.fenced = true;
}

void mbarrier_arrive(uint64_t* at, uint32_t expected_bytes) {
  Mbarrier& barrier =
      find_mbarrier(*current->block, shared_offset(at, "mbarrier_arrive"), "mbarrier_arrive");
  if (barrier.pending == 0)
    fail(text("mbarrier at byte %u: more than %d arrivals in one phase",
              shared_offset(at, "mbarrier_arrive"), barrier.arrivals));
  barrier.bytes += expected_bytes;
  --barrier.pending;
  settle(barrier);
  maybe_switch();
}

void mbarrier_wait(uint64_t* at, uint32_t parity) {
  const uint32_t offset = shared_offset(at, "mbarrier_wait");
  Mbarrier& barrier = find_mbarrier(*current->block, offset, "mbarrier_wait");
  if (parity > 1) fail(text("mbarrier_wait: parity %u", parity));
  while (barrier.phase % 2 == parity)
    sleep_on(barrier.event, text("mbarrier at byte %u, parity %u (%d arrivals and %ld bytes missing)",
                                 offset, parity, barrier.pending, static_cast<long>(barrier.bytes)));
}

}  // namespace emulator
}  // namespace fusedformer
