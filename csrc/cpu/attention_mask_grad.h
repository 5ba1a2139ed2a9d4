// The gradient of an additive mask: dS, summed over what the mask broadcasts over. A task owns a
// tile of the mask and adds up, in order, every tile of scores that it stands for. In float32
// whatever the dtype.
#pragma once

#include "attention_backward.h"

namespace fusedformer {
namespace {

// Adds dS^T of one tile of scores, whose block of keys is packed, to `total`, (BLOCK, TILE).
inline void add_score_grads(const Attention& p, const AttentionGrads& g, int64_t b, int64_t h,
                     int64_t tile, int64_t first_key, int rows, char* packed, char* scratch,
                     BackwardScratch& s, float* total) {
  prepare<Float32>(p, g, b, h, tile, packed, scratch);
  Arena own = {packed};
  const QueryTile t = QueryTile::take(Float32{}, p.dim, own);
  const Scores scores = scores_of(p, b, h, tile, first_key, rows, s);
  const int vectors = (queries_of(p, tile) + LANES - 1) / LANES;
  score_grads_tile<Float32>(p, t, scores, vectors, s);
  for (int j = 0; j < rows; ++j)
    for (int at = j * TILE; at < j * TILE + vectors * LANES; at += LANES)
      store(total + at, add(load(total + at), load(s.grads + at)));
}

// Writes `total`, summed over queries or keys where the mask has but one.
inline void store_mask_grad(const Attention& p, const AttentionGrads& g, int64_t mask_row,
                            int64_t first_query, int64_t first_key, float* total) {
  const int64_t sizes[2] = {g.mask_sizes[2], g.mask_sizes[3]};
  const bool one_query = sizes[0] < p.n_queries, one_key = sizes[1] < p.n_keys;
  const int64_t left_i = p.n_queries - first_query, left_j = p.n_keys - first_key;
  const int queries = one_query ? 1 : static_cast<int>(left_i < TILE ? left_i : TILE);
  const int keys = one_key ? 1 : static_cast<int>(left_j < BLOCK ? left_j : BLOCK);
  if (one_key)
    for (int j = 1; j < BLOCK; ++j)
      for (int i = 0; i < TILE; ++i) total[i] += total[j * TILE + i];
  if (one_query)
    for (int j = 0; j < keys; ++j)
      for (int half = TILE / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) total[j * TILE + i] += total[j * TILE + i + half];
  const int size = bytes_of(p.mask_dtype);
  for (int i = 0; i < queries; ++i) {
    float row[BLOCK];
    for (int j = 0; j < keys; ++j) row[j] = total[j * TILE + i];
    const int64_t at = (mask_row * sizes[0] + first_query + i) * sizes[1] + first_key;
    from_floats(p.mask_dtype, row, 1.0f, keys, g.grad_mask + at * size);
  }
}

inline void mask_grad(const Attention& p, const AttentionGrads& g, int64_t task, char* scratch) {
  // prepare() uses the scratch of the backward for what it packs; the keys lie in what it leaves.
  Arena arena = {scratch};
  BackwardScratch s(p, arena);
  char* packed = arena.take<char>(query_tile_bytes<Float32>(p));
  float* total = arena.take<float>(BLOCK * TILE);
  fill(total, BLOCK * TILE, 0);

  const bool one_query = g.mask_sizes[2] < p.n_queries, one_key = g.mask_sizes[3] < p.n_keys;
  const int64_t blocks = one_key ? 1 : p.blocks(), tiles = one_query ? 1 : p.tiles();
  const int64_t block = task % blocks, tile = task / blocks % tiles;
  const int64_t row = task / blocks / tiles;  // of batches and heads of the mask
  const int64_t mask_head = row % g.mask_sizes[1], mask_batch = row / g.mask_sizes[1];
  const int64_t blocks_end = one_key ? p.blocks() : block + 1;
  const int64_t tiles_end = one_query ? p.tiles() : tile + 1;
  for (int64_t b = mask_batch; b < p.batches; b += g.mask_sizes[0])
    for (int64_t h = mask_head; h < p.heads; h += g.mask_sizes[1])
      for (int64_t k = block; k < blocks_end; ++k) {
        const int64_t first = k * BLOCK, length = p.key_length(b);
        const int n = static_cast<int>(length - first < BLOCK ? length - first : BLOCK);
        if (n <= 0) break;
        pack_block<Float32>(p, b, h / p.group(), first, n, s);
        for (int64_t t = tile; t < tiles_end; ++t) {
          const int64_t seen = p.key_end(b, t) - first;
          if (seen > 0)
            add_score_grads(p, g, b, h, t, first, static_cast<int>(seen < n ? seen : n),
                                  packed, scratch, s, total);
        }
      }
  store_mask_grad(p, g, row, one_query ? 0 : tile * TILE, one_key ? 0 : block * BLOCK, total);
}

}  // namespace
}  // namespace fusedformer
