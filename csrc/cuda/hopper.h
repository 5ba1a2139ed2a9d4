// What Hopper's attention kernels use of the chip, one thin function for each instruction.
//
// This file is the interface. Under nvcc hopper_ptx.h carries it out, with PTX of sm_90a; under a
// plain C++ compiler the emulator of the tests does (tests/hopper, found with -I), so that the
// same kernels run on a host. Kernels use nothing of CUDA beyond what stands here, and plain C++.
//
// Words of the trade: a warpgroup is four warps, the first at a multiple of four. The generic proxy
// is ordinary loads and stores, the async proxy what TMA and wgmma do on their own: shared memory
// written through the first is seen by the second only after fence_async() by the writer and a
// barrier. "Uniform" is the same in all threads of a warp. Names in `code` are PTX instructions.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <cuda_emulated.h>  // __device__, __global__, ..., __nv_bfloat16, __half
#endif

namespace fusedformer {
namespace hopper {

// ---- Threads -------------------------------------------------------------------------------

__device__ __forceinline__ int thread_index();  // in the block, which is one-dimensional
__device__ __forceinline__ int warp_index();    // of the thread in its block; uniform, and known so
__device__ __forceinline__ int lane();
__device__ __forceinline__ int block_index();  // the grid is one-dimensional
__device__ __forceinline__ int block_size();
__device__ __forceinline__ int grid_size();

// True in one thread of the warp, the same at each call; all 32 call it (`elect.sync`).
__device__ __forceinline__ bool elect_one();

// The block's dynamic shared memory, 1024-byte aligned. Kernels declare no other.
__device__ __forceinline__ unsigned char* shared_memory();
// The 32-bit shared-memory address that descriptors hold.
__device__ __forceinline__ uint32_t shared_address(const void* shared);

__device__ __forceinline__ void sync_threads();
__device__ __forceinline__ void sync_warp();

// Named barriers 1 to 15 (0 is sync_threads). `threads`, a multiple of 32, counts those that sync
// and those that only arrive.
__device__ __forceinline__ void barrier_sync(int id, int threads);
__device__ __forceinline__ void barrier_arrive(int id, int threads);

// Moves registers between warpgroups (`setmaxnreg`); all four warps call it. The kernel needs
// __launch_bounds__(threads, 1). 24 to 256, a multiple of 8.
template <int kRegisters>
__device__ __forceinline__ void registers_up();
template <int kRegisters>
__device__ __forceinline__ void registers_down();

// Stops the kernel with an error.
__device__ __forceinline__ void trap();

// ---- Values --------------------------------------------------------------------------------

// `value` of lane `lane() ^ mask`, or of lane `source`; Value is float, int or uint32_t.
template <typename Value>
__device__ __forceinline__ Value shuffle_xor(Value value, int mask);
template <typename Value>
__device__ __forceinline__ Value shuffle(Value value, int source);
__device__ __forceinline__ bool any_in_warp(bool value);

__device__ __forceinline__ float fast_exp2(float x);  // `ex2.approx.ftz`: 2 ulp; 0 at -inf
__device__ __forceinline__ float fast_log2(float x);  // `lg2.approx.ftz`; -inf at 0

// x = 0 where none of `bits` is set in `word`; x is finite. A product with 0 in x's own register: a
// choice of two values, in C++, takes a copy more, and the integer unit, which is the busier one.
__device__ __forceinline__ void zero_unless(float& x, uint32_t word, uint32_t bits);

// Element: __nv_bfloat16 or __half. pack() rounds to nearest; `low` is the lower half, that is the
// element of the smaller column in a fragment.
template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <typename Element>
__device__ __forceinline__ void unpack(uint32_t packed, float& low, float& high);
template <typename Element>
__device__ __forceinline__ float to_float(Element x);
template <typename Element>
__device__ __forceinline__ Element from_float(float x);

// ---- mbarriers -----------------------------------------------------------------------------
// A uint64_t in shared memory, eight-byte aligned. A phase ends when `arrivals` have arrived and
// all bytes expected have landed; then the next begins. The first has parity 0.

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals);
// By the initialising thread, after the last mbarrier_init and before a barrier of the block.
__device__ __forceinline__ void mbarrier_init_fence();
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier);
// Arrives, and first makes the phase wait for `bytes` more.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, uint32_t bytes);
// Returns once the phase of this parity is over. On a fresh barrier parity 1 returns at once, as
// does every parity whose phase is not the present one: that is how a producer starts.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity);

// This thread's writes to shared memory so far become visible to the async proxy
// (`fence.proxy.async.shared::cta`); a barrier must follow, unless this thread itself starts the
// copy.
__device__ __forceinline__ void fence_async();

// ---- TMA: copies of boxes of 4-D tensors ---------------------------------------------------
// One thread calls these. A box is that of its map; coordinates are of its first element, innermost
// dimension first: d < D, n < N, h < H, b < B. What lies outside the tensor is read as zero (and
// counts among the barrier's bytes) and is not written.

// What cuTensorMapEncodeTiled makes; a kernel takes it as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

__device__ __forceinline__ void prefetch_map(const TensorMap& map);
__device__ __forceinline__ void tma_load(void* shared, const TensorMap& map, uint64_t* barrier,
                                         int d, int n, int h, int b);
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* shared, int d, int n,
                                          int h, int b);

// Plain bytes, in multiples of 16 and aligned to 16 at both ends.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier);
// global[i] += shared[i], each addition atomic, in no particular order.
__device__ __forceinline__ void bulk_reduce_add(float* global, const float* shared, uint32_t bytes);

// Stores and reductions since the last commit of this thread become a group. tma_wait_read: all but
// the kPending last groups of this thread have read their shared memory. tma_wait: they are done,
// and seen by this thread.
__device__ __forceinline__ void tma_commit();
template <int kPending>
__device__ __forceinline__ void tma_wait_read();
template <int kPending>
__device__ __forceinline__ void tma_wait();

// ---- wgmma: a warpgroup's matrix product, m64 nN k16 ---------------------------------------
// acc (64 x N, fp32) = a (64 x 16) b (16 x N) + (accumulate ? acc : 0), of bf16 or fp16. All 128
// threads of a warpgroup call it; it runs on its own until waited for. layouts.h says who holds
// what, and makes the descriptors. N: 16 to 256, a multiple of 16. Element: as for pack().
//
//   wgmma_fence(acc);                // acc is as this thread last wrote it
//   for (...) wgmma_ss<N, Element>(acc, desc_a, desc_b, true);
//   wgmma_commit();
//   ... anything that does not touch acc ...
//   wgmma_wait<0>(acc);              // acc may be used

// The arrays of registers, of any number of dimensions, that the next products read or write: also
// before the first, and where they are overwritten only. Between products into one acc none is
// needed.
template <typename... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... registers);
// The products of this warpgroup since its last commit become a group.
__device__ __forceinline__ void wgmma_commit();
// All but the kPending last groups are done. `registers` are the accumulators (or A operands) that
// may be touched from here on: naming them keeps the compiler from moving their uses up.
template <int kPending, typename... Registers>
__device__ __forceinline__ void wgmma_wait(Registers&... registers);

// Both operands in shared memory. As it stands, a is 64 rows of k and b is N rows of k (that is
// b^T, "K-major"); transposed, a is k rows of 64 and b is k rows of N.
template <int N, typename Element, bool kTransposeA = false, bool kTransposeB = false>
__device__ __forceinline__ void wgmma_ss(float (&acc)[N / 2], uint64_t descriptor_a,
                                         uint64_t descriptor_b, bool accumulate);
// a in registers, which must not change until waited for.
template <int N, typename Element, bool kTransposeB = false>
__device__ __forceinline__ void wgmma_rs(float (&acc)[N / 2], const uint32_t (&a)[4],
                                         uint64_t descriptor_b, bool accumulate);

// Four 8 x 8 matrices of 16-bit elements from registers to shared memory (`stmatrix`). Lane l gives
// the address of row l % 8 (eight elements, 16-byte aligned) of matrix l / 8. Matrix m is
// registers[m] of all lanes: lane l holds row l / 4, columns 2 (l % 4) and the next. Transposed: it
// holds these of the matrix's transpose, which is to say column l / 4 of what is stored.
template <bool kTransposed = false>
__device__ __forceinline__ void store_matrices(void* shared_row, const uint32_t (&registers)[4]);

// ---- Global memory -------------------------------------------------------------------------

__device__ __forceinline__ int atomic_add(int* global, int value);  // returns what was there
__device__ __forceinline__ void atomic_add(float* global, float value);
__device__ __forceinline__ int load_acquire(const int* global);  // `ld.acquire.gpu`
__device__ __forceinline__ void store_release(int* global, int value);
__device__ __forceinline__ void add_release(int* global, int value);  // `red.release.gpu.add`

}  // namespace hopper
}  // namespace fusedformer

#if defined(__CUDACC__)
#include "hopper_ptx.h"
#else
#include <hopper_emulated.h>
#endif
