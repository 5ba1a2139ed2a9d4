// The emulator's own state, shared by its files.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <list>
#include <map>
#include <memory>
#include <vector>

#include "emulator.h"

namespace fusedformer {
namespace emulator {

constexpr int kNobody = -1;

struct Fiber;
struct Block;

// What fibers wait for: they sleep here until somebody wakes them to look again.
struct Event {
  std::vector<Fiber*> sleepers;
};

// An accumulator of one thread whose products are under way. Its registers hold NaN meanwhile.
struct Accumulator {
  float* registers;
  std::vector<float> values;
  size_t last;  // the last product into it, counted within the warpgroup
};

// Registers as they were at the thread's last wgmma_fence that named them.
struct Fenced {
  const unsigned char* registers;
  std::vector<unsigned char> bytes;
};

// Bulk stores that one thread has committed together.
struct StoreGroup {
  int unread = 0, unwritten = 0;
};

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  bool started = false, finished = false;
  int thread;
  Block* block;
  std::function<std::string()> waiting;  // for what, in the report of a deadlock
  int parity = 0;       // of its warp's exchanges
  std::vector<size_t> dirty;  // granules of 16 bytes that it wrote without fence_async since
  std::deque<std::shared_ptr<StoreGroup>> stores;
  std::shared_ptr<StoreGroup> open_stores;
  size_t issued = 0;                 // products of wgmma
  size_t waited = 0;                 // those below are over for this thread
  std::vector<size_t> wgmma_groups;  // `issued` at each commit
  std::list<Accumulator> accumulators;
  std::list<Fenced> fenced;
};

struct WarpState {
  Event event;
  int arrived = 0;
  uint64_t generation = 0;
  uint64_t words[2][32];
};

struct NamedBarrier {
  Event event;
  int arrived = 0, threads = 0;
  uint64_t generation = 0;
};

struct Mbarrier {
  Event event;
  int arrivals, pending;
  int64_t bytes = 0;
  uint64_t phase = 0;   // the present one
  uint64_t loaded = 0;  // phases up to the last that waits for bytes
  uint64_t waited = 0;  // phases up to the last that was waited for
  bool fenced = false;
};

// A product of a warpgroup, from the first thread's call until it is computed.
struct WarpgroupProduct {
  Product product;
  int threads = 0;
  Accumulator* acc[128];
  const uint32_t* a_registers[128];
  uint32_t a[128][4];
};

struct Warpgroup {
  Event event;
  std::deque<WarpgroupProduct> products;
  size_t first = 0;  // number of products.front(); those before are done
};

struct Block {
  int index;
  int alive;
  unsigned char* shared;
  std::vector<unsigned char> seen;  // shared memory as it was at the last look
  std::vector<int> writer;          // per granule of 16 bytes: who wrote it without a fence
  std::vector<Fiber> fibers;
  std::vector<WarpState> warps;
  std::vector<Warpgroup> warpgroups;
  NamedBarrier barriers[16];
  std::map<uint32_t, Mbarrier> mbarriers;  // by offset in shared memory
  std::vector<int> warp_registers;
  int free_registers;
  Event registers_event;
  Event stores_event;
  int tasks = 0;  // that still read or write its shared memory
};

// What the chip has been asked to do by itself. step() does a part of it, and is true for the last.
struct Task {
  Block* block;
  virtual bool step() = 0;
  virtual ~Task() = default;
};

extern Fiber* current;
extern Launch launch;
extern std::vector<std::unique_ptr<Task>> tasks;

// On behalf of the running thread.
void start_task(std::unique_ptr<Task> task);

uint32_t random_below(uint32_t limit);
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string name(const Fiber& fiber);
[[noreturn]] void fail_anywhere(const std::string& what);

// Gives others their turn until somebody wakes the event. `waiting` says what for, should nobody.
void sleep_on(Event& event, std::function<std::string()> waiting);
void wake(Event& event);

// The bytes [offset, offset + size) of shared memory, or an error.
unsigned char* shared_bytes(Block& block, uint32_t offset, size_t size, const char* what);
uint32_t shared_offset(const void* shared, const char* what);
// Notes what the running thread has written to shared memory.
void look_at_writes();
// For the async proxy: an error where these bytes were written by a thread without fence_async.
void check_fenced(Block& block, uint32_t offset, size_t size, const char* what);
// Writes of the async proxy.
void write_shared(Block& block, uint32_t offset, const void* data, size_t size);
Mbarrier& find_mbarrier(Block& block, uint32_t offset, const char* what);
void settle(Mbarrier& barrier);

// At the end of a thread, and of a block.
void check_thread_end(Fiber& fiber);
void check_block_end(Block& block);

constexpr uint32_t kSharedBase = 1024;  // the chip keeps the first KiB for itself

}  // namespace emulator
}  // namespace fusedformer
