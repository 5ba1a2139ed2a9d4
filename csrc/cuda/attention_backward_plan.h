// What attention's backward on Hopper fixes before any kernel runs: tile sizes, the layout of
// shared memory and of the workspace, who adds to dQ when. Pure arithmetic, for host and device.
#pragma once

#include <stddef.h>

#include "attention.h"
#include "layouts.h"
#include "schedule.h"

namespace fusedformer {
namespace hopper {

// A CTA owns a block of kKeys keys and visits tiles of kQueries queries. Two warpgroups share the
// work, in one of two ways; the sizes are what the registers of their threads hold: 240, and 232
// with dropout.
//
// kSplitsKeys, D <= 128: a warpgroup owns 64 of 128 keys. What S^T and dP^T leave in its registers
// are the rows that its dV and dK ask for. Registers of a thread:
//   dK and dV      2 x kDim / 2      (64 keys x kDim, 128 threads)
//   S^T and dP^T   2 x kQueries / 2  (64 keys x kQueries)
//   P^T and dS^T   2 x kQueries / 4  (in 16 bits, as operands of the next products)
//   its half of dQ kQueries x kDim / 256, once S^T and dP^T are gone
// that is 224, both for 128 queries at D = 64 and for 64 at D = 128.
//
// Otherwise dK and dV of 64 keys fill the registers of both: each owns half of the columns, and
// computes S^T and dP^T for half of the queries. P^T and dS^T then go through shared memory.
//   dK and dV      2 x kDim / 4      (64 keys x kDim / 2)
//   S^T and dP^T   2 x 16            (64 keys x 32 queries)
//   its half of dQ kDim / 4          (64 queries x kDim / 2)
// 192 at D = 256. Shared memory has room for one tile of queries, and none for the next.
template <int kDimension>
struct BackwardTile {
  static constexpr int kDim = kDimension;  // a tensor's D may be less
  static constexpr bool kSplitsKeys = kDim <= 128;
  static constexpr int kKeys = kSplitsKeys ? 128 : 64;
  static constexpr int kQueries = kDim <= 64 ? 128 : 64;
  static constexpr int kStages = kSplitsKeys ? 2 : 1;  // tiles of queries on their way at once

  // A warpgroup's: columns of dK and dV, queries of S^T and dP^T.
  static constexpr int kColumns = kSplitsKeys ? kDim : kDim / 2;
  static constexpr int kScores = kSplitsKeys ? kQueries : kQueries / 2;

  // Q, dO, K and V lie in panels of 64 columns (layouts.h). Each half of the columns has panels of
  // its own where the warpgroups split them: at D = 192 columns 0 to 63, 64 to 127, 96 to 159, 160
  // on.
  static constexpr int kSlabs = kDim / kColumns;
  static constexpr int kSlabPanels = panels(kColumns);
  static constexpr int kPanels = kSlabs * kSlabPanels;
  // What the products over queries compute: at D = 96 and 192 more columns than are kept.
  static constexpr int kProducts = product_columns(kColumns);

  // dQ of a tile is made in two parts, one by each warpgroup, of 64 rows: a tile of 64 rows is
  // parted by columns, one of 128 by rows. At D = 96 the second part has columns that are not
  // there.
  static constexpr bool kPartsAreColumns = kQueries == 64;
  static constexpr int kPartColumns = kSplitsKeys ? kPanelColumns : kColumns;
  static constexpr int kPartProducts = product_columns(kPartColumns);  // computed, as above
  static constexpr int kPartFloats = 64 * kPartColumns;
};

constexpr int kConsumers = 2;  // warpgroups
constexpr int kBackwardThreads = 128 * (1 + kConsumers);

// The first column of a panel.
template <typename Tile>
FUSEDFORMER_HOST_DEVICE constexpr int panel_column(int panel) {
  return panel / Tile::kSlabPanels * Tile::kColumns + panel % Tile::kSlabPanels * kPanelColumns;
}

// For k_major_step: where the step-th 16 columns are, panels filled up.
template <typename Tile>
FUSEDFORMER_HOST_DEVICE constexpr int panel_step(int step) {
  constexpr int kSteps = Tile::kColumns / 16, kFilled = Tile::kSlabPanels * kPanelColumns / 16;
  return step / kSteps * kFilled + step % kSteps;
}

// The shared memory of a CTA. Panels first: they lie on 1024 bytes.
template <typename Element, typename Tile>
struct alignas(1024) BackwardShared {
  using Panel = Element[kPanelColumns];
  // A stage: what one tile of queries brings along.
  Panel queries[Tile::kStages][Tile::kPanels][Tile::kQueries];
  Panel grad_outs[Tile::kStages][Tile::kPanels][Tile::kQueries];
  Panel keys[Tile::kPanels][Tile::kKeys];      // dK on its way out, in the end
  Panel values[Tile::kPanels][Tile::kKeys];    // dV likewise
  // dS^T, a row for each key; P^T, too, if it does not stay in registers. Twice: one warpgroup may
  // be a tile ahead of the other.
  Panel grad_scores[2][Tile::kQueries / kPanelColumns][Tile::kKeys];
  Panel weights[Tile::kSplitsKeys ? 0 : 2][Tile::kQueries / kPanelColumns][Tile::kKeys];
  // dQ on its way out: of each warpgroup its half, in the order of its registers.
  float grad_queries[kConsumers][Tile::kPartFloats];
  float rows[Tile::kStages][2][Tile::kQueries];  // LSE in units of log2, and the shift
  uint32_t kept[Tile::kStages][dropout_bytes(Tile::kKeys, Tile::kQueries) / 4];  // dropout bits
  uint64_t full[Tile::kStages], empty[Tile::kStages];
  uint64_t key_values_full;
  uint64_t grad_query_full[kConsumers], grad_query_empty[kConsumers];
  int work;  // which block of keys this CTA took
};

// Floats of a part of dQ in the workspace: columns that are not there are left out.
template <typename Tile>
FUSEDFORMER_HOST_DEVICE constexpr int part_floats(int part) {
  const int left = Tile::kDim - (Tile::kPartsAreColumns ? part * Tile::kPartColumns : 0);
  return 64 * (left < Tile::kPartColumns ? left : Tile::kPartColumns);
}

// The workspace. A "tile" is kQueries queries of one head of one batch; rows past Nq are there,
// too, so that every tile is whole.
struct BackwardWorkspace {
  float* grad_query;  // (B, H, tiles, kQueries x kDim): sums of dQ in the order of grad_query_index
  float* rows;        // (B, H, tiles, 2, kQueries): LSE and shift as BackwardShared::rows has them
  int* turns;         // (B, H, tiles): how many blocks of keys have added to dQ
  int* ticket;        // the next block of keys to be taken; null where the order does not matter
  size_t bytes;
};

FUSEDFORMER_HOST_DEVICE int tiles_of(int n, int rows) { return (n + rows - 1) / rows; }

template <typename Tile>
inline BackwardWorkspace backward_workspace(const Attention& p, bool deterministic, void* memory) {
  static_assert(part_floats<Tile>(0) + part_floats<Tile>(1) == Tile::kQueries * Tile::kDim,
                "the parts of dQ are all of it");
  const size_t tiles = size_t(p.batches) * p.heads * tiles_of(p.n_queries, Tile::kQueries);
  char* const base = static_cast<char*>(memory);
  const size_t rows_at = tiles * Tile::kQueries * Tile::kDim * sizeof(float);
  const size_t turns_at = rows_at + tiles * 2 * Tile::kQueries * sizeof(float);
  const size_t end = turns_at + (deterministic ? (tiles + 1) * sizeof(int) : 0);
  int* const turns = reinterpret_cast<int*>(base + turns_at);
  return {reinterpret_cast<float*>(base), reinterpret_cast<float*>(base + rows_at),
          deterministic ? turns : nullptr, deterministic ? turns + tiles : nullptr, end};
}

// In which order CTAs take blocks of keys. Queries and dO of a section's heads share the L2 cache.
// Early keys are seen by most queries: longest first. With turns it is the other way round: the
// last block that a tile of queries sees adds first, and it comes to that tile first of all, so
// that under a causal mask nobody waits; and a CTA waits only for blocks that were taken before its
// own.
template <typename Tile>
inline TileOrder backward_order(const Attention& p, bool deterministic) {
  const long long group_bytes = 4LL * p.n_queries * p.dim * (p.heads / p.key_heads);
  return tile_order(p.batches, p.key_heads, p.key_heads, p.n_keys, Tile::kKeys, group_bytes,
                    deterministic);
}

// Tiles of queries that see some key of a block: [first, end).
FUSEDFORMER_HOST_DEVICE int first_query_tile(int first_key, int length, int diagonal,
                                             int n_queries, int rows) {
  const int end = tiles_of(n_queries, rows);
  if (first_key >= length) return end;
  const int query = first_key - diagonal;  // the first that sees the first key
  const int tile = query <= 0 ? 0 : query / rows;
  return tile < end ? tile : end;
}

// How many blocks of keys have added to a tile's dQ before this one does.
FUSEDFORMER_HOST_DEVICE int turn_of(int block, int tile, int length, int diagonal, int rows,
                                    int columns) {
  return key_blocks((tile + 1) * rows, length, diagonal, columns) - 1 - block;
}

struct KeyBlock {
  int batch, key_head, block, first_key;
  int length;             // keys of this batch
  int diagonal;
  int first_tile, tiles;  // of a head's tiles of queries, these are visited: [first_tile, tiles)
  int visits;             // over all heads of the group
};

// Of all visits of a CTA the t-th: every head of the group, every tile.
struct Visit {
  int head, tile;
  int64_t at;  // among all tiles of the workspace
};

template <typename Tile>
FUSEDFORMER_HOST_DEVICE KeyBlock key_block(const Attention& p, const TileOrder& order,
                                           int index) {
  const HeadTile taken = tile_at(order, index);
  KeyBlock k;
  k.batch = taken.head / p.key_heads;
  k.key_head = taken.head % p.key_heads;
  k.block = taken.block;
  k.first_key = taken.block * Tile::kKeys;
  k.length = p.key_lengths ? clamp_length(p.key_lengths[k.batch], p.n_keys) : p.n_keys;
  k.diagonal = static_cast<int>(p.diagonal);
  k.tiles = tiles_of(p.n_queries, Tile::kQueries);
  k.first_tile =
      first_query_tile(k.first_key, k.length, k.diagonal, p.n_queries, Tile::kQueries);
  k.visits = (k.tiles - k.first_tile) * (p.heads / p.key_heads);
  return k;
}

FUSEDFORMER_HOST_DEVICE Visit visit_of(const Attention& p, const KeyBlock& k, int t) {
  const int per_head = k.tiles - k.first_tile;
  Visit v;
  v.head = k.key_head * (p.heads / p.key_heads) + t / per_head;
  v.tile = k.first_tile + t % per_head;
  v.at = (static_cast<int64_t>(k.batch) * p.heads + v.head) * k.tiles + v.tile;
  return v;
}

// Where (row, column) of dQ lies in its tile of the workspace. Parts follow one another. In a part,
// register 4 c + k of thread t lies at 512 c + 4 t + k: each thread stores 16 bytes at a time, side
// by side with its neighbours, and a column block c is contiguous, so that the copy to the
// workspace may end where kDim does.
template <typename Tile>
FUSEDFORMER_HOST_DEVICE int grad_query_index(int row, int column) {
  const int part = Tile::kPartsAreColumns ? column / Tile::kPartColumns : row / 64;
  const int i = row % 64, j = column % Tile::kPartColumns;
  const int thread = 32 * (i / 16) + 4 * (i % 8) + j % 8 / 2;
  return part * Tile::kPartFloats + 512 * (j / 8) + 4 * thread + 2 * (i / 8 % 2) + j % 2;
}

}  // namespace hopper
}  // namespace fusedformer
