// Runs the Hopper kernels on a host, to prove them without a GPU: see emulator.cpp.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <string>

namespace fusedformer {

namespace hopper {
struct TensorMap;
}

namespace emulator {

// ---- For drivers ---------------------------------------------------------------------------

struct Launch {
  int grid = 1;               // blocks
  int threads = 128;          // in a block, a multiple of 32
  size_t shared_bytes = 0;    // dynamic shared memory of a block
  uint64_t seed = 0;          // of the order of events, which is another for each
  int resident = 1;           // blocks that run at once; the others follow, lowest index first
  int registers = 0;          // per thread at the start; 0: as __launch_bounds__(threads, 1) has it
  bool check_fences = true;   // find shared memory that lacks fence_async; costs time
};

// Calls `kernel`, which takes no arguments, in every thread. Throws std::runtime_error when one of
// them does what the chip forbids, when none can go on, or where the kernel calls trap().
void run(const Launch& launch, const std::function<void()>& kernel);

// A map of a tensor (B, H, N, D) for TMA: sizes and strides (of elements) in this order, box
// likewise. swizzle: 128, or 0 for none.
hopper::TensorMap make_tensor_map(const void* data, int element_bytes, const int64_t (&sizes)[4],
                                  const int64_t (&strides)[4], const int (&box)[4], int swizzle);

// ---- For hopper_emulated.h -----------------------------------------------------------------

int thread_index();
int block_index();
int block_size();
int grid_size();
int leader_lane();

unsigned char* shared_memory();
uint32_t shared_address(const void* shared);

// Ends the run with an error that also names the thread.
[[noreturn]] void fail(const std::string& what);
// Another thread may go first.
void maybe_switch();

void warp_barrier(const char* what);
// Writes this lane's word and returns all 32 lanes'.
const uint64_t* warp_exchange(uint64_t word, const char* what);
void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);
void set_registers(int count, bool up);

void mbarrier_init(uint64_t* barrier, int arrivals);
void mbarrier_init_fence();
void mbarrier_arrive(uint64_t* barrier, uint32_t expected_bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);

void fence_async();
void tma_load(void* shared, const hopper::TensorMap& map, uint64_t* barrier, const int (&at)[4]);
void tma_store(const hopper::TensorMap& map, const void* shared, const int (&at)[4]);
void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);
void bulk_reduce_add(float* global, const float* shared, uint32_t bytes);
void tma_commit();
void tma_wait(int pending, bool read_only);

// A product as one thread asks for it.
struct Product {
  int n;
  bool bfloat16, transpose_a, transpose_b, accumulate;
  const uint32_t* a_registers;  // null: a comes from shared memory
  uint64_t descriptor_a, descriptor_b;
  float* acc;
};

void wgmma_touch_fence(const void* registers, size_t bytes);
void wgmma_fence();
void wgmma(const Product& product);
void wgmma_commit();
// Waits; then wgmma_release() gives the results to the arrays named.
void wgmma_wait(int pending);
void wgmma_release(const void* registers, size_t bytes);

int load_acquire(const int* global);

}  // namespace emulator
}  // namespace fusedformer
