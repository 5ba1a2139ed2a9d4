// What hides scores: the diagonal and the mask, as one tile of numbers to add to the scores.
// Keys past the lengths need none: they are never read.
#pragma once

#include "attention_pack.h"

namespace fusedformer {
namespace {

// Finite, so that no difference of two is NaN: a hidden score; the least maximum of a row, so that
// a row with nothing to attend to has weights of 0; and the LSE for such a row in the backward.
// Differences of any two, in units of log2, are far below what has an exponential and above -inf.
constexpr float HIDDEN = -1e38f, LEAST_MAXIMUM = -0.5e38f, LSE_OF_NOTHING = 0.5e38f;
constexpr float NEVER = -1e30f;  // an additive value at or below this hides its key

// n elements of the mask, `stride` bytes apart, as numbers to add.
inline void mask_to_floats(const Attention& p, const char* from, int64_t stride, int n, float* to) {
  if (p.mask_dtype == DType::boolean) {
    for (int k = 0; k < n; ++k) to[k] = from[k * stride] ? 0.0f : HIDDEN;
    return;
  }
  to_floats(p.mask_dtype, from, stride, n, to);
  for (int k = 0; k < n; ++k) to[k] = to[k] <= NEVER ? HIDDEN : to[k];
}

// The mask of `queries` x `keys` scores, as (keys, TILE).
inline void mask_tile(const Attention& p, const char* from, int queries, int keys, float* rows,
                      float* to) {
  const int64_t stride_i = p.mask_strides[2], stride_j = p.mask_strides[3];
  const int filled = rounded_up(queries, LANES);
  if (stride_i == 0) {
    mask_to_floats(p, from, stride_j, keys, rows);
    for (int j = 0; j < keys; ++j) fill(to + j * TILE, filled, rows[j]);
    return;
  }
  if (stride_j == 0) {
    fill(to, filled, 0);
    mask_to_floats(p, from, stride_i, queries, to);
    for (int j = 1; j < keys; ++j) __builtin_memcpy(to + j * TILE, to, sizeof(float) * filled);
    return;
  }
  for (int i = 0; i < filled; ++i)
    if (i < queries)
      mask_to_floats(p, from + i * stride_i, stride_j, keys, rows + i * BLOCK);
    else
      fill(rows + i * BLOCK, keys, 0);
  for (int i = 0; i < filled; i += LANES)  // beyond `keys` there is room, and nothing that is read
    for (int j = 0; j < keys; j += LANES)
      transpose(rows + i * BLOCK + j, BLOCK, to + j * TILE + i, TILE);
}

// What to add to the scores of queries from `query` on and keys from `key` on, (keys, TILE); null
// where that is nothing. `rows` has room for TILE x BLOCK, `to` for BLOCK x TILE.
inline const float* bias_tile(const Attention& p, int64_t b, int64_t h, int64_t query, int queries,
                              int64_t key, int keys, float* rows, float* to) {
  const bool crossed = key + keys - 1 > query + p.diagonal;
  if (!p.mask && !crossed) return nullptr;
  if (p.mask) {
    const int64_t* strides = p.mask_strides;
    const char* corner = p.mask + b * strides[0] + h * strides[1] + query * strides[2];
    mask_tile(p, corner + key * strides[3], queries, keys, rows, to);
  } else {
    fill(to, keys * TILE, 0);
  }
  if (crossed)
    for (int j = 0; j < keys; ++j) {
      const int64_t hidden = key + j - p.diagonal - query;  // the queries before the first to see j
      if (hidden > 0) fill(to + j * TILE, static_cast<int>(hidden < TILE ? hidden : TILE), HIDDEN);
    }
  return to;
}

}  // namespace
}  // namespace fusedformer
