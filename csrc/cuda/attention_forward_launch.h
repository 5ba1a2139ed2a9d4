// Attention's forward on Hopper: the launch, for one size of tile. Each size is compiled in a file
// of its own, attention_forward_*.cu, so that they compile side by side.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "attention_forward.h"
#include "tensor_map.h"

namespace fusedformer {
namespace hopper {

inline void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("attention: the forward: ") + cudaGetErrorString(error));
}

template <typename Tile>
ForwardMaps forward_maps(const Attention& p) {
  const auto of_queries = [&](const Tensor4& t, int rows) {
    return tensor_map(t, p.dtype, p.batches, p.heads, p.n_queries, p.dim, rows);
  };
  const auto of_keys = [&](const Tensor4& t) {
    return tensor_map(t, p.dtype, p.batches, p.key_heads, p.n_keys, p.dim, Tile::kKeys);
  };
  return {of_queries(p.query, Tile::kQueries), of_keys(p.key), of_keys(p.value),
          of_queries(p.out, 64)};
}

template <typename Element, typename Tile, bool kDropout>
void launch(Attention p, cudaStream_t stream) {
  // Beyond these it hides all keys, or none; the kernel's sums are of 32 bits.
  if (p.diagonal < -p.n_queries) p.diagonal = -p.n_queries;
  if (p.diagonal > p.n_keys) p.diagonal = p.n_keys;
  constexpr size_t kShared = sizeof(ForwardShared<Element, Tile>);
  static_assert(kShared <= 227 * 1024, "a CTA of Hopper has 227 KB of shared memory");
  const auto kernel = attention_forward_kernel<Element, Tile, kDropout>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));

  int device, processors;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const TileOrder order = forward_order<Tile>(p);
  const int tiles = tile_count(order);
  check(cudaMemsetAsync(p.counter, 0, sizeof(int), stream));
  kernel<<<tiles < processors ? tiles : processors, kForwardThreads<Tile>, kShared, stream>>>(
      p, forward_maps<Tile>(p), order);
  check(cudaGetLastError());
}

// For tensors with D <= kDim, as attention_forward.
template <int kDim>
void launch_forward(const Attention& p, cudaStream_t stream) {
  using Tile = ForwardTile<kDim>;
  if (p.dtype == DType::bfloat16)
    (p.seed ? launch<__nv_bfloat16, Tile, true> : launch<__nv_bfloat16, Tile, false>)(p, stream);
  else
    (p.seed ? launch<__half, Tile, true> : launch<__half, Tile, false>)(p, stream);
}

}  // namespace hopper
}  // namespace fusedformer
