// hopper.h for nvcc: PTX of sm_90a. What each function promises stands in hopper.h.
#pragma once

#include "hopper.h"

namespace fusedformer {
namespace hopper {

// ---- Threads -------------------------------------------------------------------------------

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
// The shuffle tells the compiler that the warp agrees.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x) / 32, 0);
}
__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int block_index() { return blockIdx.x; }
__device__ __forceinline__ int block_size() { return blockDim.x; }
__device__ __forceinline__ int grid_size() { return gridDim.x; }

__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xFFFFFFFF;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void sync_threads() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void trap() { asm volatile("trap;"); }

// ---- Values --------------------------------------------------------------------------------

template <typename Value>
__device__ __forceinline__ Value shuffle_xor(Value value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFF, value, mask);
}

template <typename Value>
__device__ __forceinline__ Value shuffle(Value value, int source) {
  return __shfl_sync(0xFFFFFFFF, value, source);
}

__device__ __forceinline__ bool any_in_warp(bool value) { return __any_sync(0xFFFFFFFF, value); }

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void zero_unless(float& x, uint32_t word, uint32_t bits) {
  asm(
      "{\n"
      ".reg .pred none;\n"
      ".reg .b32 set;\n"
      "and.b32 set, %1, %2;\n"
      "setp.eq.u32 none, set, 0;\n"
      "@none mul.f32 %0, %0, 0f00000000;\n"
      "}\n"
      : "+f"(x)
      : "r"(word), "r"(bits));
}

template <typename Element>
__device__ __forceinline__ constexpr bool is_bfloat16() {
  return false;
}
template <>
__device__ __forceinline__ constexpr bool is_bfloat16<__nv_bfloat16>() {
  return true;
}

template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (is_bfloat16<Element>())
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <typename Element>
__device__ __forceinline__ float to_float(Element x) {
  return static_cast<float>(x);
}

// By pack(), for the instruction that converts one number runs at a fraction of its rate.
template <typename Element>
__device__ __forceinline__ Element from_float(float x) {
  const unsigned short bits = static_cast<unsigned short>(pack<Element>(x, 0.f));
  if constexpr (is_bfloat16<Element>())
    return __ushort_as_bfloat16(bits);
  else
    return __ushort_as_half(bits);
}

template <typename Element>
__device__ __forceinline__ void unpack(uint32_t packed, float& low, float& high) {
  if constexpr (is_bfloat16<Element>()) {
    low = __uint_as_float(packed << 16);
    high = __uint_as_float(packed & 0xFFFF0000);
  } else {
    low = __half2float(__ushort_as_half(static_cast<unsigned short>(packed)));
    high = __half2float(__ushort_as_half(static_cast<unsigned short>(packed >> 16)));
  }
}

// ---- mbarriers -----------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void mbarrier_init_fence() {
  // The second is for TMA, which completes on them.
  asm volatile(
      "fence.mbarrier_init.release.cluster;\n"
      "fence.proxy.async.shared::cta;" ::
          : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  // try_wait sleeps a while by itself before it says no.
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- TMA -----------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// A block on its own is a cluster of one: its addresses serve as shared::cluster's, too.
__device__ __forceinline__ void tma_load(void* shared, const TensorMap& map, uint64_t* barrier,
                                         int d, int n, int h, int b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(d), "r"(n), "r"(h), "r"(b)
      : "memory");
}

__device__ __forceinline__ void tma_store(const TensorMap& map, const void* shared, int d, int n,
                                          int h, int b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::
          "l"(&map),
      "r"(shared_address(shared)), "r"(d), "r"(n), "r"(h), "r"(b)
      : "memory");
}

__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void bulk_reduce_add(float* global, const float* shared,
                                                uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
          __cvta_generic_to_global(global)),
      "r"(shared_address(shared)), "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void tma_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

template <int kPending>
__device__ __forceinline__ void tma_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Fragments to shared memory, global memory ---------------------------------------------

template <bool kTransposed>
__device__ __forceinline__ void store_matrices(void* shared_row, const uint32_t (&registers)[4]) {
  if constexpr (kTransposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(shared_row)),
                 "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(shared_row)),
                 "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
                 : "memory");
}

__device__ __forceinline__ int atomic_add(int* global, int value) {
  return atomicAdd(global, value);
}

__device__ __forceinline__ void atomic_add(float* global, float value) { atomicAdd(global, value); }

__device__ __forceinline__ int load_acquire(const int* global) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(global))
               : "memory");
  return value;
}

__device__ __forceinline__ void store_release(int* global, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(global)),
               "r"(value)
               : "memory");
}

__device__ __forceinline__ void add_release(int* global, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(global)),
               "r"(value)
               : "memory");
}

}  // namespace hopper
}  // namespace fusedformer

#include "hopper_wgmma_ptx.h"
