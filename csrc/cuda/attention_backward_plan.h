// What attention's backward on Hopper fixes before any kernel runs: tile sizes, the layout of shared
// memory and of the workspace, who adds to dQ when. Pure arithmetic, for host and device.
#pragma once

#include <stddef.h>

#include "attention.h"
#include "layouts.h"
#include "schedule.h"

namespace fusedformer {
namespace hopper {

// A CTA owns a block of kKeys keys and visits tiles of kQueries queries, kDim columns wide. The sizes
// are what the registers of 2 x 128 threads hold. Each warpgroup owns 64 keys; a thread then needs
//   dK and dV          2 x kDim / 2      (64 keys x kDim, 128 threads)
//   S^T, dP^T          2 x kQueries / 2  (64 keys x kQueries)
//   P^T and dS^T       2 x kQueries / 4  (in 16 bits, as operands of the next products)
//   its half of dQ     kQueries x kDim / 256, after S^T and dP^T are gone
// floats: 224 of the 240 there are, both for 128 queries at D = 64 and for 64 at D = 128.
template <int kDimension>
struct BackwardTile {
  static constexpr int kDim = kDimension;            // a tensor's D may be less
  static constexpr int kPanels = panels(kDim);       // of 64 columns: see layouts.h
  static constexpr int kKeys = 128;
  static constexpr int kQueries = kDim <= 64 ? 128 : 64;
  static constexpr int kStages = 2;                  // tiles of queries on their way at once
};

constexpr int kPartFloats = 64 * kPanelColumns;  // of dQ: see grad_query_index
constexpr int kConsumers = 2;      // warpgroups
constexpr int kBackwardThreads = 128 * (1 + kConsumers);

// The shared memory of a CTA. Panels first: they lie on 1024 bytes.
template <typename Element, typename Tile>
struct alignas(1024) BackwardShared {
  using Panel = Element[kPanelColumns];
  // A stage: what one tile of queries brings along.
  Panel queries[Tile::kStages][Tile::kPanels][Tile::kQueries];
  Panel grad_outs[Tile::kStages][Tile::kPanels][Tile::kQueries];
  Panel keys[Tile::kPanels][Tile::kKeys];      // dK on its way out, in the end
  Panel values[Tile::kPanels][Tile::kKeys];    // dV likewise
  // dS^T, a row for each key. Twice: one warpgroup may be a tile ahead of the other.
  Panel grad_scores[2][Tile::kQueries / kPanelColumns][Tile::kKeys];
  // dQ on its way out: of each warpgroup its half, in the order of its registers.
  float grad_queries[kConsumers][kPartFloats];
  float rows[Tile::kStages][2][Tile::kQueries];  // LSE in units of log2, and the shift
  uint32_t kept[Tile::kStages][dropout_bytes(Tile::kKeys, Tile::kQueries) / 4];  // dropout bits
  uint64_t full[Tile::kStages], empty[Tile::kStages];
  uint64_t key_values_full;
  uint64_t grad_query_full[kConsumers], grad_query_empty[kConsumers];
  int work;  // which block of keys this CTA took
};

// The workspace. A "tile" is kQueries queries of one head of one batch; rows past Nq are there, too,
// so that every tile is whole.
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
  const size_t tiles =
      size_t(p.batches) * p.heads * tiles_of(p.n_queries, Tile::kQueries);
  char* const base = static_cast<char*>(memory);
  const size_t rows_at = tiles * Tile::kQueries * Tile::kDim * sizeof(float);
  const size_t turns_at = rows_at + tiles * 2 * Tile::kQueries * sizeof(float);
  const size_t end = turns_at + (deterministic ? (tiles + 1) * sizeof(int) : 0);
  int* const turns = reinterpret_cast<int*>(base + turns_at);
  return {reinterpret_cast<float*>(base), reinterpret_cast<float*>(base + rows_at),
          deterministic ? turns : nullptr, deterministic ? turns + tiles : nullptr, end};
}

// In which order CTAs take blocks of keys. Queries and dO of a section's heads share the L2 cache.
// Early keys are seen by most queries: longest first. With turns it is the other way round: the last
// block that a tile of queries sees adds first, and it comes to that tile first of all, so that
// under a causal mask nobody waits; and a CTA waits only for blocks that were taken before its own.
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

// dQ of a tile is made in two parts, one by each warpgroup, of 64 rows by 64 columns: a tile of 64
// rows is parted by columns, one of 128 by rows.
template <typename Tile>
constexpr bool kPartsAreColumns = Tile::kQueries == 64;

// Floats of a part in the workspace: columns past kDim are left out.
template <typename Tile>
FUSEDFORMER_HOST_DEVICE int part_floats(int part) {
  const int columns = kPartsAreColumns<Tile> ? Tile::kDim - part * kPanelColumns : kPanelColumns;
  return 64 * (columns < kPanelColumns ? columns : kPanelColumns);
}

// Where (row, column) of dQ lies in its tile of the workspace. Parts follow one another. In a part,
// register 4 c + k of thread t lies at 512 c + 4 t + k: each thread stores 16 bytes at a time, side
// by side with its neighbours, and a column block c is contiguous, so that the copy to the workspace
// may end where kDim does.
template <typename Tile>
FUSEDFORMER_HOST_DEVICE int grad_query_index(int row, int column) {
  const int part = kPartsAreColumns<Tile> ? column / kPanelColumns : row / 64;
  const int i = row % 64, j = column % kPanelColumns;
  const int thread = 32 * (i / 16) + 4 * (i % 8) + j % 8 / 2;
  return part * kPartFloats + 512 * (j / 8) + 4 * thread + 2 * (i / 8 % 2) + j % 2;
}

}  // namespace hopper
}  // namespace fusedformer
