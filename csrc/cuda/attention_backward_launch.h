// Attention's backward on Hopper: the launches, for one size of tile. Each size is compiled in a
// file of its own, attention_backward_*.cu, so that they compile side by side.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "attention_backward.h"
#include "tensor_map.h"

namespace fusedformer {
namespace hopper {

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("attention: ") + kernel + ": " +
                             cudaGetErrorString(error));
}

template <typename Tile>
BackwardMaps backward_maps(const Attention& p, const AttentionGrads& g) {
  const auto of_queries = [&](const Tensor4& t) {
    return tensor_map(t, p.dtype, p.batches, p.heads, p.n_queries, p.dim, Tile::kQueries);
  };
  const auto of_keys = [&](const Tensor4& t) {
    return tensor_map(t, p.dtype, p.batches, p.key_heads, p.n_keys, p.dim, Tile::kKeys);
  };
  return {of_queries(p.query), of_queries(g.grad_out), of_keys(p.key),
          of_keys(p.value),    of_keys(g.grad_key),    of_keys(g.grad_value)};
}

template <typename Element, typename Tile, bool kDropout>
void launch(Attention p, const AttentionGrads& g, cudaStream_t stream) {
  // Beyond these it hides all keys, or none; the kernels' sums are of 32 bits.
  if (p.diagonal < -p.n_queries) p.diagonal = -p.n_queries;
  if (p.diagonal > p.n_keys) p.diagonal = p.n_keys;
  const BackwardWorkspace w = backward_workspace<Tile>(p, g.deterministic, g.workspace);
  const int tiles = p.batches * p.heads * tiles_of(p.n_queries, Tile::kQueries);
  prepare_rows<Element, Tile><<<tiles, kPrepareThreads, 0, stream>>>(p, g, w);
  check_launch("prepare_rows");

  constexpr size_t kShared = sizeof(BackwardShared<Element, Tile>);
  static_assert(kShared <= 227 * 1024, "a CTA of Hopper has 227 KB of shared memory");
  const auto kernel = attention_grads<Element, Tile, kDropout>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared) !=
      cudaSuccess)
    check_launch("attention_grads");
  const TileOrder order = backward_order<Tile>(p, g.deterministic);
  kernel<<<tile_count(order), kBackwardThreads, kShared, stream>>>(p, w, order,
                                                                   backward_maps<Tile>(p, g));
  check_launch("attention_grads");

  convert_grad_query<Element, Tile><<<tiles, kConvertThreads, 0, stream>>>(p, g, w);
  check_launch("convert_grad_query");
}

// For tensors with D <= kDim, as attention_backward; and the bytes of its workspace.
template <int kDim>
void launch_backward(const Attention& p, const AttentionGrads& g, cudaStream_t stream) {
  using Tile = BackwardTile<kDim>;
  if (p.dtype == DType::bfloat16)
    (p.seed ? launch<__nv_bfloat16, Tile, true> : launch<__nv_bfloat16, Tile, false>)(p, g, stream);
  else
    (p.seed ? launch<__half, Tile, true> : launch<__half, Tile, false>)(p, g, stream);
}

template <int kDim>
int64_t backward_workspace_bytes(const Attention& p, bool deterministic) {
  return backward_workspace<BackwardTile<kDim>>(p, deterministic, nullptr).bytes;
}

}  // namespace hopper
}  // namespace fusedformer
