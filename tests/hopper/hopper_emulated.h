// hopper.h for a plain C++ compiler: hands everything to the emulator.
#pragma once

#include <math.h>

#include "emulator.h"

namespace fusedformer {
namespace hopper {

inline int thread_index() { return emulator::thread_index(); }
inline int warp_index() { return emulator::thread_index() / 32; }
inline int lane() { return emulator::thread_index() % 32; }
inline int block_index() { return emulator::block_index(); }
inline int block_size() { return emulator::block_size(); }
inline int grid_size() { return emulator::grid_size(); }
inline bool elect_one() {
  emulator::warp_barrier("elect_one");
  return lane() == emulator::leader_lane();
}

inline unsigned char* shared_memory() { return emulator::shared_memory(); }
inline uint32_t shared_address(const void* shared) { return emulator::shared_address(shared); }

inline void sync_threads() { emulator::barrier_sync(0, block_size()); }
inline void sync_warp() { emulator::warp_barrier("sync_warp"); }
inline void barrier_sync(int id, int threads) { emulator::barrier_sync(id, threads); }
inline void barrier_arrive(int id, int threads) { emulator::barrier_arrive(id, threads); }

template <int kRegisters>
inline void registers_up() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg");
  emulator::set_registers(kRegisters, true);
}
template <int kRegisters>
inline void registers_down() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg");
  emulator::set_registers(kRegisters, false);
}

inline void trap() { emulator::fail("trap() was called"); }

template <typename Value>
inline Value shuffle(Value value, int source) {
  static_assert(sizeof(Value) == 4, "float, int or uint32_t");
  uint32_t word;
  memcpy(&word, &value, sizeof word);
  word = static_cast<uint32_t>(emulator::warp_exchange(word, "shuffle")[source % 32]);
  memcpy(&value, &word, sizeof word);
  return value;
}
template <typename Value>
inline Value shuffle_xor(Value value, int mask) {
  return shuffle(value, lane() ^ mask);
}
inline bool any_in_warp(bool value) {
  const uint64_t* values = emulator::warp_exchange(value, "any_in_warp");
  bool any = false;
  for (int i = 0; i < 32; ++i) any = any || values[i];
  return any;
}

inline float fast_exp2(float x) { return exp2f(x); }
inline float fast_log2(float x) { return log2f(x); }

inline void zero_unless(float& x, uint32_t word, uint32_t bits) {
  if (!(word & bits)) x = 0;
}

template <typename Element>
inline float to_float(Element x) {
  return emulator::widen(x);
}
template <typename Element>
inline Element from_float(float x) {
  Element out;
  emulator::narrow(x, out);
  return out;
}
template <typename Element>
inline uint32_t pack(float low, float high) {
  const uint32_t upper = from_float<Element>(high).bits;
  return from_float<Element>(low).bits | upper << 16;
}
template <typename Element>
inline void unpack(uint32_t packed, float& low, float& high) {
  low = to_float(Element{static_cast<uint16_t>(packed)});
  high = to_float(Element{static_cast<uint16_t>(packed >> 16)});
}

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  emulator::mbarrier_init(barrier, arrivals);
}
inline void mbarrier_init_fence() { emulator::mbarrier_init_fence(); }
inline void mbarrier_arrive(uint64_t* barrier) { emulator::mbarrier_arrive(barrier, 0); }
inline void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  emulator::mbarrier_arrive(barrier, bytes);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  emulator::mbarrier_wait(barrier, parity);
}

inline void fence_async() { emulator::fence_async(); }

inline void prefetch_map(const TensorMap&) {}
inline void tma_load(void* shared, const TensorMap& map, uint64_t* barrier, int d, int n, int h,
                     int b) {
  emulator::tma_load(shared, map, barrier, {d, n, h, b});
}
inline void tma_store(const TensorMap& map, const void* shared, int d, int n, int h, int b) {
  emulator::tma_store(map, shared, {d, n, h, b});
}
inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  emulator::bulk_load(shared, global, bytes, barrier);
}
inline void bulk_reduce_add(float* global, const float* shared, uint32_t bytes) {
  emulator::bulk_reduce_add(global, shared, bytes);
}
inline void tma_commit() { emulator::tma_commit(); }
template <int kPending>
inline void tma_wait_read() {
  emulator::tma_wait(kPending, true);
}
template <int kPending>
inline void tma_wait() {
  emulator::tma_wait(kPending, false);
}

template <typename... Registers>
inline void wgmma_fence(Registers&... registers) {
  (emulator::wgmma_touch_fence(&registers, sizeof(registers)), ...);
  emulator::wgmma_fence();
}
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending, typename... Registers>
inline void wgmma_wait(Registers&... registers) {
  emulator::wgmma_wait(kPending);
  (emulator::wgmma_release(&registers, sizeof(registers)), ...);
}

template <typename Element>
constexpr bool is_bfloat16() {
  static_assert(__is_same(Element, __nv_bfloat16) || __is_same(Element, __half), "Element");
  return __is_same(Element, __nv_bfloat16);
}
template <int N, typename Element, bool kTransposeA, bool kTransposeB>
inline void wgmma_ss(float (&acc)[N / 2], uint64_t descriptor_a, uint64_t descriptor_b,
                     bool accumulate) {
  static_assert(N % 16 == 0 && N >= 16 && N <= 256, "N");
  emulator::wgmma({N, is_bfloat16<Element>(), kTransposeA, kTransposeB, accumulate, nullptr,
                   descriptor_a, descriptor_b, acc});
}
template <int N, typename Element, bool kTransposeB>
inline void wgmma_rs(float (&acc)[N / 2], const uint32_t (&a)[4], uint64_t descriptor_b,
                     bool accumulate) {
  static_assert(N % 16 == 0 && N >= 16 && N <= 256, "N");
  emulator::wgmma(
      {N, is_bfloat16<Element>(), false, kTransposeB, accumulate, a, 0, descriptor_b, acc});
}

template <bool kTransposed>
inline void store_matrices(void* shared_row, const uint32_t (&registers)[4]) {
  if (shared_address(shared_row) % 16) emulator::fail("store_matrices: a row is misaligned");
  uint16_t row[8];
  for (int m = 0; m < 4; ++m) {
    const uint64_t* words = emulator::warp_exchange(registers[m], "store_matrices");
    if (lane() / 8 != m) continue;
    for (int column = 0; column < 8; ++column) {
      const int r = kTransposed ? column : lane() % 8, c = kTransposed ? lane() % 8 : column;
      row[column] = static_cast<uint16_t>(words[4 * r + c / 2] >> 16 * (c % 2));
    }
  }
  memcpy(shared_row, row, sizeof row);
}

// Blocks run on one thread of the host: plain arithmetic is atomic.
inline int atomic_add(int* global, int value) {
  emulator::maybe_switch();
  const int old = *global;
  *global += value;
  return old;
}
inline void atomic_add(float* global, float value) { *global += value; }
inline int load_acquire(const int* global) { return emulator::load_acquire(global); }
inline void store_release(int* global, int value) {
  *global = value;
  emulator::maybe_switch();
}
inline void add_release(int* global, int value) {
  *global += value;
  emulator::maybe_switch();
}

}  // namespace hopper
}  // namespace fusedformer
