// What the threads of a block share in the emulator: barriers, registers, shared memory, mbarriers.
#include <string.h>

#include <algorithm>

#include "emulator_state.h"

namespace fusedformer {
namespace emulator {

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
    sleep_on(warp.event, [what] { return text("the rest of its warp at %s", what); });
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
  // The chip counts warps: a lane on its own cannot take part.
  warp_barrier("a named barrier");
  const uint64_t generation = current->block->barriers[id & 15].generation;
  NamedBarrier& barrier = arrive(id, threads);
  while (barrier.generation == generation)
    sleep_on(barrier.event,
             [id, threads] { return text("barrier %d of %d threads", id, threads); });
}

void barrier_arrive(int id, int threads) {
  warp_barrier("a named barrier");
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
      sleep_on(block.registers_event, [count] { return text("%d registers", count); });
    block.free_registers -= (count - mine) * 32;
    mine = count;
    wake(block.registers_event);
  }
  warp_barrier("setmaxnreg");
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
      if (block.writer[i / 16] != current->thread) current->dirty.push_back(i / 16);
      block.writer[i / 16] = current->thread;
    }
  }
}

void fence_async() {
  look_at_writes();
  for (size_t granule : current->dirty)
    if (current->block->writer[granule] == current->thread)
      current->block->writer[granule] = kNobody;
  current->dirty.clear();
}

void check_fenced(Block& block, uint32_t offset, size_t size, const char* what) {
  if (!launch.check_fences) return;
  for (size_t granule = offset / 16; granule <= (offset + size - 1) / 16; ++granule)
    if (block.writer[granule] != kNobody)
      fail_anywhere(
          text("%s: byte %zu of shared memory, written by thread %d without fence_async()", what,
               granule * 16, block.writer[granule]));
}

void write_shared(Block& block, uint32_t offset, const void* data, size_t size) {
  memcpy(block.shared + offset, data, size);
  memcpy(block.seen.data() + offset, data, size);
}

// ---- mbarriers -----------------------------------------------------------------------------

Mbarrier& find_mbarrier(Block& block, uint32_t offset, const char* what) {
  auto found = block.mbarriers.find(offset);
  if (found == block.mbarriers.end())
    fail_anywhere(text("%s: no mbarrier was initialised at byte %u of shared memory", what,
                       offset));
  return found->second;
}

void settle(Mbarrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes < 0)
    fail_anywhere(text("mbarrier: %ld bytes landed that were not expected",
                       -static_cast<long>(barrier.bytes)));
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
  if (expected_bytes) barrier.loaded = barrier.phase + 1;
  --barrier.pending;
  settle(barrier);
  maybe_switch();
}

void mbarrier_wait(uint64_t* at, uint32_t parity) {
  const uint32_t offset = shared_offset(at, "mbarrier_wait");
  Mbarrier& barrier = find_mbarrier(*current->block, offset, "mbarrier_wait");
  if (parity > 1) fail(text("mbarrier_wait: parity %u", parity));
  maybe_switch();
  while (barrier.phase % 2 == parity)
    sleep_on(barrier.event, [&barrier, offset, parity] {
      return text("mbarrier at byte %u, parity %u (%d arrivals and %ld bytes missing)", offset,
                  parity, barrier.pending, static_cast<long>(barrier.bytes));
    });
  barrier.waited = std::max(barrier.waited, barrier.phase);
}

void check_block_end(Block& block) {
  for (const auto& [offset, barrier] : block.mbarriers)
    if (barrier.loaded > barrier.waited)
      fail(text("the block ends; nobody has waited for the last load of the mbarrier at byte %u",
                offset));
  for (size_t warp = 0; warp < block.warp_registers.size(); ++warp)
    if (block.warp_registers[warp] != block.warp_registers[warp / 4 * 4])
      fail("the block ends, and setmaxnreg was not called by all warps of a warpgroup alike");
}

}  // namespace emulator
}  // namespace fusedformer
