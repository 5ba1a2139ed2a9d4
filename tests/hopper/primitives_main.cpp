// A matrix product that uses everything of hopper.h, for tests/test_hopper_primitives.py, which
// calls it by ctypes; and the same with mistakes, which the emulator has to find.
#include <cstdio>
#include <exception>

#include "emulator.h"
#include "hopper.h"
#include "layouts.h"

using namespace fusedformer;
using namespace fusedformer::hopper;

namespace {

enum Mistake {
  kNone,
  kNoWaitForLoad,
  kNoWaitForProduct,
  kReleaseTooEarly,
  kWrongParity,
  kNoRelease,
  kTooFewBytes,
  kTooManyBytes,
  kAccumulatorNotFenced,
  kAccumulatorWrittenAfterFence,
  kOperandChanged,
  kNoFenceBeforeStore,
  kNoBarrierBeforeStore,
  kNoWaitForStore,
  kNoCommitOfStore,
  kMisalignedTile,
  kOutOfBounds,
  kGenericOutOfBounds,
  kNoInitFence,
  kNoInit,
  kTooManyRegisters,
  kBarrierCount,
  kOneLaneAtBarrier,
  kDifferentProducts,
  kMisalignedBulk,
  kTrap,
  kLoadNotAwaited,
  kSpin,
};

constexpr int kStep = 64, kStages = 2, kRows = 128;

struct Call {
  const void *a, *b;
  void* out;   // (B, H, M, N) of Element; (B, H, N, M) with transpose_a
  float* sum;  // (B H, 128, kN): += the product
  int64_t a_sizes[4], a_strides[4], b_sizes[4], b_strides[4], out_sizes[4], out_strides[4];
  int depth;
  int bfloat16, transpose_a, transpose_b, a_in_registers;
  int resident;
  int mistake;
  int* counter;
};

template <int N>
struct alignas(1024) Shared {
  unsigned char a[kStages][tile_bytes(kRows, kStep)];
  unsigned char b[kStages][panels(N) * 64 * 128];
  unsigned char out[tile_bytes(kRows, N)];
  float sum[kRows * N];
  uint64_t full[kStages], empty[kStages], unused;
};

// C = A B of one head for each block: 128 rows by N columns, in steps of 64. A is M x K in memory,
// or K x M (kTransposeA); B is N x K, or K x N (kTransposeB).
template <int N, typename Element, bool kTransposeA, bool kTransposeB, bool kRegistersA>
__global__ void __launch_bounds__(384, 1)
    multiply(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
             const __grid_constant__ TensorMap map_out, float* sums, int heads, int depth,
             int mistake, int* counter) {
  auto& s = *reinterpret_cast<Shared<N>*>(shared_memory());
  const int h = block_index() % heads, b = block_index() / heads;
  const int steps = (depth + kStep - 1) / kStep;
  if (thread_index() == 0) {
    for (int i = 0; i < kStages; ++i) {
      if (mistake != kNoInit) mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], 256);
    }
    mbarrier_init(&s.unused, 1);
    if (mistake != kNoInitFence) mbarrier_init_fence();
  }
  sync_threads();
  if (mistake == kTrap && thread_index() == 300) trap();

  if (warp_index() < 4) {
    if (mistake != kTooManyRegisters) registers_down<40>();
    if (warp_index() == 0 && elect_one()) {
      prefetch_map(map_a);
      for (int i = 0; i < steps; ++i) {
        const int at = i % kStages, k = i * kStep;
        mbarrier_wait(&s.empty[at], (i / kStages + (mistake == kWrongParity ? 0 : 1)) % 2);
        int bytes = sizeof s.a[at] + (kTransposeB ? sizeof s.b[at] : N * 128);
        if (mistake == kTooFewBytes) bytes -= 64;
        if (mistake == kTooManyBytes) bytes += 64;
        mbarrier_expect(&s.full[at], bytes);
        unsigned char* to = s.a[at] + (mistake == kMisalignedTile ? 512 : 0);
        if (mistake == kOutOfBounds) to = reinterpret_cast<unsigned char*>(s.sum) + sizeof s.sum;
        if (mistake == kOutOfBounds) to -= (to - shared_memory()) % 1024;
        if constexpr (kTransposeA) {
          tma_load(to, map_a, &s.full[at], 0, k, h, b);
          tma_load(to + panel_bytes(kStep), map_a, &s.full[at], 64, k, h, b);
        } else {
          tma_load(to, map_a, &s.full[at], k, 0, h, b);
        }
        if constexpr (kTransposeB) {
          for (int panel = 0; panel < panels(N); ++panel)
            tma_load(s.b[at] + panel * panel_bytes(kStep), map_b, &s.full[at], 64 * panel, k, h, b);
        } else {
          tma_load(s.b[at], map_b, &s.full[at], k, 0, h, b);
        }
      }
      if (mistake == kLoadNotAwaited) {
        mbarrier_expect(&s.unused, 64);
        bulk_load(s.sum, sums, 64, &s.unused);
      }
    }
    if (mistake == kSpin && thread_index() == 64)
      while (load_acquire(counter) != 1) continue;
    return;
  }

  registers_up<232>();
  const int group = warp_index() / 4 - 1, thread = thread_index() % 128;
  float acc[N / 2];
  uint32_t a[kStep / 16][4] = {};
  for (int i = 0; i < N / 2; ++i) acc[i] = 0;
  for (int i = 0; i < steps; ++i) {
    const int at = i % kStages;
    if (mistake != kNoWaitForLoad) mbarrier_wait(&s.full[at], i / kStages % 2);
    const uint64_t descriptor_b = kTransposeB
                                      ? transposed_descriptor(shared_address(s.b[at]), kStep)
                                      : k_major_descriptor(shared_address(s.b[at]));
    auto step_b = [](int k) { return kTransposeB ? transposed_step(k) : k_major_step(N, k); };
    if (mistake == kAccumulatorNotFenced)
      wgmma_fence(a);
    else
      wgmma_fence(acc, a);
    if (mistake == kAccumulatorWrittenAfterFence && i == 1) acc[0] += 1;
    if constexpr (kRegistersA) {
      // Operand a by the documented places of its elements.
      for (int k = 0; k < kStep / 16; ++k)
        for (int r = 0; r < 4; ++r) {
          const int row = 64 * group + fragment_row(thread, 2 * r);
          const int column = 16 * k + fragment_column(thread, 2 * r);
          a[k][r] = *reinterpret_cast<uint32_t*>(s.a[at] + tile_byte(kRows, row, column));
        }
      wgmma_fence(acc, a);
      for (int k = 0; k < kStep / 16; ++k)
        wgmma_rs<N, Element, kTransposeB>(acc, a[k], descriptor_b + step_b(k), true);
      if (mistake == kOperandChanged) a[1][2] ^= 1;
    } else {
      // A panel further on, or 64 rows, which are as many bytes.
      const uint32_t address = shared_address(s.a[at] + group * panel_bytes(64));
      const uint64_t descriptor_a =
          kTransposeA ? transposed_descriptor(address, kStep) : k_major_descriptor(address);
      for (int k = 0; k < kStep / 16; ++k) {
        const bool off = mistake == kDifferentProducts && thread == 77;
        wgmma_ss<N, Element, kTransposeA, kTransposeB>(
            acc, descriptor_a + (kTransposeA ? transposed_step(k) : k_major_step(kRows, k)),
            descriptor_b + step_b(k), off || i + k > 0);
      }
    }
    wgmma_commit();
    if (mistake == kReleaseTooEarly) mbarrier_arrive(&s.empty[at]);
    if (mistake == kNoWaitForProduct)
      wgmma_wait<1>(acc, a);
    else
      wgmma_wait<0>(acc, a);
    if (mistake != kReleaseTooEarly && mistake != kNoRelease) mbarrier_arrive(&s.empty[at]);
  }

  // As 16-bit numbers, through stmatrix: matrix 2 c + r is columns 8 c, rows 8 r of 16 x 16. With
  // kTransposeA the tile is that of C^T, whose panels are the warpgroups'.
  const int warp = warp_index() % 4;
  for (int k = 0; k < N / 16; ++k) {
    uint32_t packed[4];
    for (int i = 0; i < 4; ++i)
      packed[i] = pack<Element>(acc[8 * k + 2 * i], acc[8 * k + 2 * i + 1]);
    const int row = 64 * group + 16 * warp, column = 16 * k;
    if constexpr (kTransposeA)
      store_matrices<true>(s.out + tile_byte(N, column + lane() / 16 * 8 + lane() % 8,
                                             row + lane() / 8 % 2 * 8),
                           packed);
    else
      store_matrices(s.out + tile_byte(kRows, row + lane() % 16, column + lane() / 16 * 8), packed);
  }
  for (int i = 0; i < N / 2; ++i)
    s.sum[(64 * group + fragment_row(thread, i)) * N + fragment_column(thread, i)] = acc[i];
  if (mistake == kGenericOutOfBounds && thread == 5) shared_memory()[sizeof s + 3] = 1;
  if (mistake != kNoFenceBeforeStore) fence_async();
  if (mistake == kOneLaneAtBarrier && lane()) return;
  if (mistake != kNoBarrierBeforeStore)
    barrier_sync(1 + group, mistake == kBarrierCount && warp == 2 ? 96 : 128);
  if (thread == 0) {
    if constexpr (kTransposeA)
      tma_store(map_out, s.out + group * panel_bytes(N), 64 * group, 0, h, b);
    for (int panel = 0; panel < panels(N) && !kTransposeA; ++panel)
      tma_store(map_out, s.out + panel * panel_bytes(kRows) + group * panel_bytes(64), 64 * panel,
                64 * group, h, b);
    bulk_reduce_add(sums + (block_index() * kRows + 64 * group) * N,
                    s.sum + 64 * group * N + (mistake == kMisalignedBulk), 64 * N * sizeof(float));
    if (mistake != kNoCommitOfStore) tma_commit();
    if (mistake != kNoWaitForStore) tma_wait_read<0>();
  }
}

template <int N, typename Element, bool kTransposeA, bool kTransposeB, bool kRegistersA>
void launch(const Call& call, uint64_t seed) {
  using Numbers = const int64_t (&)[4];
  auto map = [](const void* data, Numbers sizes, Numbers strides, int rows) {
    return emulator::make_tensor_map(data, 2, sizes, strides, {1, 1, rows, 64}, 128);
  };
  const TensorMap a = map(call.a, call.a_sizes, call.a_strides, kTransposeA ? kStep : kRows);
  const TensorMap b = map(call.b, call.b_sizes, call.b_strides, kTransposeB ? kStep : N);
  const TensorMap out = map(call.out, call.out_sizes, call.out_strides, kTransposeA ? N : 64);
  emulator::Launch options;
  options.grid = static_cast<int>(call.a_sizes[0] * call.a_sizes[1]);
  options.threads = 384;
  options.shared_bytes = sizeof(Shared<N>);
  options.seed = seed;
  options.resident = call.resident;
  emulator::run(options, [&] {
    multiply<N, Element, kTransposeA, kTransposeB, kRegistersA>(
        a, b, out, call.sum, static_cast<int>(call.a_sizes[1]), call.depth, call.mistake,
        call.counter);
  });
}

template <int N, typename Element>
void launch(const Call& call, uint64_t seed) {
  if (call.a_in_registers)
    (call.transpose_b ? launch<N, Element, false, true, true>
                      : launch<N, Element, false, false, true>)(call, seed);
  else if (call.transpose_a)
    (call.transpose_b ? launch<N, Element, true, true, false>
                      : launch<N, Element, true, false, false>)(call, seed);
  else
    (call.transpose_b ? launch<N, Element, false, true, false>
                      : launch<N, Element, false, false, false>)(call, seed);
}

}  // namespace

// Returns 0, or 1 and the error's text.
extern "C" int product(const Call* call, uint64_t seed, char* error, size_t error_bytes) {
  try {
    if (call->bfloat16)
      launch<128, __nv_bfloat16>(*call, seed);
    else
      launch<96, __half>(*call, seed);
  } catch (const std::exception& e) {
    std::snprintf(error, error_bytes, "%s", e.what());
    return 1;
  }
  return 0;
}

extern "C" uint32_t packed(float low, float high, int bfloat16) {
  return bfloat16 ? pack<__nv_bfloat16>(low, high) : pack<__half>(low, high);
}
