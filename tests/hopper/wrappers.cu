// Every function of hopper.h, for the compiler: tests/test_hopper_primitives.py reads what it says
// and what it makes of them.
#include "dropout_bits.h"
#include "hopper.h"
#include "layouts.h"

using namespace fusedformer::hopper;

// All forms of wgmma for one N.
template <int N, typename Element>
__device__ __forceinline__ void products(float (&acc)[N / 2], uint32_t (&a)[4], uint32_t address,
                                         bool accumulate) {
  const uint64_t rows = k_major_descriptor(address), columns = transposed_descriptor(address, 64);
  wgmma_fence(acc, a);
  wgmma_ss<N, Element>(acc, rows + k_major_step(64, 1), rows, accumulate);
  wgmma_ss<N, Element, false, true>(acc, rows, columns + transposed_step(1), true);
  wgmma_ss<N, Element, true, false>(acc, columns, rows, true);
  wgmma_ss<N, Element, true, true>(acc, columns, columns, true);
  wgmma_rs<N, Element>(acc, a, rows, true);
  wgmma_rs<N, Element, true>(acc, a, columns, true);
  wgmma_commit();
  wgmma_wait<0>(acc, a);
}

template <int N>
__global__ void __launch_bounds__(384, 1) every_product(float* out) {
  if (warp_index() < 4) {
    registers_down<24>();
    return;
  }
  registers_up<240>();
  float acc[N / 2];
  uint32_t a[4] = {1, 2, 3, 4};
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0;
  products<N, __nv_bfloat16>(acc, a, shared_address(shared_memory()), false);
  products<N, __half>(acc, a, shared_address(shared_memory()), true);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) out[thread_index() * (N / 2) + i] = acc[i];
}

template __global__ void every_product<16>(float*);
template __global__ void every_product<32>(float*);
template __global__ void every_product<48>(float*);
template __global__ void every_product<64>(float*);
template __global__ void every_product<80>(float*);
template __global__ void every_product<96>(float*);
template __global__ void every_product<112>(float*);
template __global__ void every_product<128>(float*);
template __global__ void every_product<144>(float*);
template __global__ void every_product<160>(float*);
template __global__ void every_product<176>(float*);
template __global__ void every_product<192>(float*);
template __global__ void every_product<208>(float*);
template __global__ void every_product<224>(float*);
template __global__ void every_product<240>(float*);
template __global__ void every_product<256>(float*);

template <typename Element>
__device__ __forceinline__ float conversions(float x) {
  float low, high;
  unpack<Element>(pack<Element>(x, x + 1), low, high);
  return low + high + to_float(from_float<Element>(x));
}

__global__ void __launch_bounds__(128, 1)
    everything_else(const __grid_constant__ TensorMap map, float* out, int* counter) {
  unsigned char* const shared = shared_memory();
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared);
  float* const tile = reinterpret_cast<float*>(shared + 1024);
  if (warp_index() == 0 && elect_one()) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    prefetch_map(map);
    mbarrier_expect(barrier, 8192 + 64);
    tma_load(tile, map, barrier, 0, 1, 2, 3);
    bulk_load(tile + 2048, out, 64, barrier);
  }
  sync_threads();
  mbarrier_wait(barrier, 0);
  const float x = fast_exp2(shuffle_xor(tile[lane()], 1)) + fast_log2(shuffle(tile[lane()], 3));
  if (any_in_warp(x < 0)) trap();
  zero_unless(tile[lane()], *counter, 4);
  uint32_t words[4] = {pack<__half>(x, x), 1, 2, 3};
  store_matrices(shared + 1024 + 16 * lane(), words);
  store_matrices<true>(shared + 2048 + 16 * lane(), words);
  make_dropout_bits<64, 64, false, 128>(reinterpret_cast<uint32_t*>(shared + 4096), *counter, 5, 0,
                                        0, 0, 0, thread_index());
  sync_warp();
  barrier_arrive(1, 256);
  barrier_sync(2, 128);
  fence_async();
  mbarrier_arrive(barrier);
  if (warp_index() == 0 && elect_one()) {
    tma_store(map, tile, 0, 1, 2, 3);
    bulk_reduce_add(out, tile, 64);
    tma_commit();
    tma_wait_read<0>();
    tma_wait<0>();
    while (load_acquire(counter) < atomic_add(counter, 1)) continue;
    store_release(counter, grid_size());
    add_release(counter + 1, block_size());
    atomic_add(out, conversions<__nv_bfloat16>(x) + conversions<__half>(block_index() + x));
  }
}
