// Attention on the CPU: what its entry points hand to its kernels.
//
// The work is cut into tiles of TILE queries and blocks of BLOCK keys; neither depends on the
// number of threads, so that no result does.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "isa.h"

// What is inline here is compiled for every instruction set, and must leave no copy to share.
#define FUSEDFORMER_INLINE inline __attribute__((always_inline))

namespace fusedformer {

constexpr int TILE = 64;    // queries; a multiple of 16, as the dropout mask's tiles ask
constexpr int BLOCK = 128;  // keys; likewise
constexpr int MAX_DIM = 256;  // of a head
constexpr int MAX_TILES = 4;  // that a task of the forward takes at once

enum class DType { float32, bfloat16, float16, boolean };

FUSEDFORMER_INLINE int bytes_of(DType dtype) {
  return dtype == DType::float32 ? 4 : dtype == DType::boolean ? 1 : 2;
}

// A (B, H, N, D) tensor, unit stride in D; strides in bytes.
struct Tensor4 {
  char* data;
  int64_t batch, head, row;

  FUSEDFORMER_INLINE char* at(int64_t b, int64_t h, int64_t n) const {
    return data + b * batch + h * head + n * row;
  }
};

struct Attention {
  int64_t batches, heads, key_heads, n_queries, n_keys;
  int dim;
  DType dtype;                   // of query, key, value, out and their gradients
  Tensor4 query, key, value, out;
  float* lse;                    // (B, H, Nq), contiguous; null: the forward writes none
  const char* mask;              // broadcast over (B, H, Nq, Nk) by strides of 0; or null
  int64_t mask_strides[4];       // in bytes
  DType mask_dtype;
  const int32_t* key_lengths;    // (B,), or null
  int64_t diagonal;              // query i sees keys j <= i + diagonal
  float scale;
  bool dropout;
  uint64_t seed;
  uint32_t threshold;            // a word below it drops its element
  float inverse_keep;            // 1 / (1 - p)
  int64_t offsets[4];            // of batch, head, query and key, in the dropout mask

  FUSEDFORMER_INLINE int64_t tiles() const { return (n_queries + TILE - 1) / TILE; }
  FUSEDFORMER_INLINE int64_t blocks() const { return (n_keys + BLOCK - 1) / BLOCK; }
  FUSEDFORMER_INLINE int64_t group() const { return heads / key_heads; }

  FUSEDFORMER_INLINE int64_t key_length(int64_t b) const {
    if (!key_lengths) return n_keys;
    const int64_t length = key_lengths[b];
    return length < 0 ? 0 : length < n_keys ? length : n_keys;
  }

  // Where the keys end that some query of a tile sees.
  FUSEDFORMER_INLINE int64_t key_end(int64_t b, int64_t tile) const {
    const int64_t after = (tile + 1) * TILE < n_queries ? (tile + 1) * TILE : n_queries;
    const int64_t seen = after + diagonal, length = key_length(b);
    return seen < 0 ? 0 : seen < length ? seen : length;
  }
};

struct AttentionGrads {
  Tensor4 grad_out, grad_query, grad_key, grad_value;
  const float* grad_lse;          // (B, H, Nq), contiguous; or null
  char* grad_mask;                // (the mask's own shape), contiguous, mask_dtype; or null
  int64_t mask_sizes[4];
};

// What the backward shares among its tasks for some heads of keys at a time: see attention_ops.cpp.
struct AttentionWave {
  int64_t first_unit;  // a unit is a head of keys, in the order of (batch, head of keys)
  int64_t n_units;
  char* tiles;         // packed tiles of queries: n_units x group x tiles(), query_tile_bytes each
  int* done;           // for each of these, how many blocks of keys have added to its dQ
};

struct AttentionForwardKernels {
  size_t (*scratch_bytes)(const Attention&);
  // O and LSE of n tiles, from the first one on; n <= MAX_TILES.
  void (*forward)(const Attention&, int64_t b, int64_t h, int64_t first_tile, int n, char* scratch);
};

// Every query tile of a wave is prepared; then come its tasks (unit, block). Those of one unit have
// to be started in ascending order of blocks: a task waits for what the one before it has added.
struct AttentionBackwardKernels {
  size_t (*scratch_bytes)(const Attention&);
  size_t (*query_tile_bytes)(const Attention&);
  void (*prepare)(const Attention&, const AttentionGrads&, int64_t b, int64_t h, int64_t tile,
                  char* packed, char* scratch);
  void (*key_block)(const Attention&, const AttentionGrads&, const AttentionWave&, int64_t unit,
                    int64_t block, char* scratch);
  void (*mask_grad)(const Attention&, const AttentionGrads&, int64_t task, char* scratch);
};

// Tasks of the mask's gradient: one for each tile of the mask. A tile of the scores where the mask
// has every query and key; a row or column of such tiles, or all, where it broadcasts.
FUSEDFORMER_INLINE int64_t mask_grad_tasks(const Attention& p, const AttentionGrads& g) {
  return g.mask_sizes[0] * g.mask_sizes[1] * (g.mask_sizes[2] < p.n_queries ? 1 : p.tiles()) *
         (g.mask_sizes[3] < p.n_keys ? 1 : p.blocks());
}

// Returns when *counter, which other threads raise, is value.
void attention_wait(const int* counter, int value);

// The tables of avx512bf16 hold the kernels for bfloat16 alone, with its own dot products; all
// others compute in float32 whatever the dtype, and serve that CPU for float32 and float16.
FUSEDFORMER_TABLE(AttentionForwardKernels, attention_forward_kernels);
FUSEDFORMER_TABLE(AttentionBackwardKernels, attention_backward_kernels);

}  // namespace fusedformer
