// What attention's forward on Hopper fixes before its kernel runs: tile sizes, the layout of shared
// memory, the order of tiles. attention_forward.h says what for.
#pragma once

#include "attention.h"
#include "hopper.h"
#include "layouts.h"
#include "schedule.h"

namespace fusedformer {
namespace hopper {

// Sizes for a head dimension of at most kDimension. A consumer's thread holds, for 64 queries,
//   O                    kOutDim / 2 registers
//   S of the next block  kKeys / 2
//   P of this block      kKeys / 4, in 16 bits
// of the kConsumerRegisters that it has; and shared memory has 227 KB for Q, kStages of K and of V,
// and O on its way out, if that fits: else O takes Q's place when the tile is done.
//
// Each of these is a choice, and csrc/cuda/variants has others, to be measured beside it.
template <int kDimension>
struct ForwardTile {
  static constexpr int kDim = kDimension;       // a tensor's D may be less: TMA fills up with zeros
  static constexpr int kPanels = panels(kDim);  // see layouts.h
  static constexpr int kOutDim = product_columns(kDim);
  static constexpr int kProducers = 1, kConsumers = 2;  // warpgroups
  static constexpr int kQueries = 64 * kConsumers;
  static constexpr int kKeys = kDim <= 128 ? 128 : kDim <= 192 ? 96 : 64;
  static constexpr int kStages = 2;  // or more: see take_turn()
  static constexpr bool kOwnOut = kDim <= 128;
  static constexpr bool kTurns = true;  // ping-pong
  // setmaxnreg: 64 K registers for all. What the producers do without, the consumers get.
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
};

constexpr int kWarpgroup = 128;  // threads
template <typename Tile>
constexpr int kForwardThreads = kWarpgroup * (Tile::kProducers + Tile::kConsumers);
// All of the producers but warp 0.
template <typename Tile>
constexpr int kBitWarps = 4 * Tile::kProducers - 1;

// As TMA sees the tensors. Boxes are panels: 64 columns by kQueries rows (query), kKeys rows (key,
// value) or 64 rows (out).
struct ForwardMaps {
  TensorMap query, key, value, out;
};

// What warp 0 tells the others of the tile that it took.
struct alignas(16) ForwardWork {
  int batch;  // -1: there is no more
  int head;
  int first_query;
  int length;  // keys of this batch
};

template <typename Element, typename Tile>
struct alignas(1024) ForwardShared {
  using Panel = Element[kPanelColumns];
  // Panels come first: they lie on 1024 bytes.
  Panel query[Tile::kPanels][Tile::kQueries];
  Panel key[Tile::kStages][Tile::kPanels][Tile::kKeys];
  Panel value[Tile::kStages][Tile::kPanels][Tile::kKeys];
  Panel own_out[Tile::kOwnOut ? Tile::kPanels : 1][Tile::kOwnOut ? Tile::kQueries : 8];
  uint32_t kept[Tile::kStages][dropout_bytes(Tile::kQueries, Tile::kKeys) / 4];  // dropout's bits
  ForwardWork work[2];
  uint64_t query_full, query_empty;
  uint64_t key_full[Tile::kStages], key_empty[Tile::kStages];
  uint64_t value_full[Tile::kStages], value_empty[Tile::kStages];
  uint64_t kept_full[Tile::kStages], kept_empty[Tile::kStages];
  uint64_t work_full[2], work_empty[2];

  // Where O is on its way out.
  __device__ __forceinline__ auto& out() {
    if constexpr (Tile::kOwnOut)
      return own_out;
    else
      return query;
  }
};

// Where a thread stands in a ring of kBuffers: the buffer that is due, and the parity of the phase
// in which it gets full. Whoever fills it waits for the opposite parity of its "empty" first, which
// lets the first round pass.
template <int kBuffers>
struct Cursor {
  int at = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++at < kBuffers) return;
    at = 0;
    parity ^= 1;
  }
};

// How many blocks of keys a tile needs.
template <typename Tile>
FUSEDFORMER_HOST_DEVICE int blocks_of(const Attention& p, const ForwardWork& work) {
  const int after = work.first_query + Tile::kQueries;
  return key_blocks(after < p.n_queries ? after : p.n_queries, work.length,
                    static_cast<int>(p.diagonal), Tile::kKeys);
}

// In which order tiles are taken: the last queries first, as they see most keys.
template <typename Tile>
inline TileOrder forward_order(const Attention& p) {
  const long long head_bytes = 2LL * 2 * p.n_keys * p.dim;  // of K and V, in 16 bits
  return tile_order(p.batches, p.heads, p.key_heads, p.n_queries, Tile::kQueries, head_bytes, true);
}

// ---- What producers and consumers share --------------------------------------------------------

// A buffer has been read by this warp: by all its lanes, and they all have seen it full. A lane
// that came late to that wait would find the parity of another phase.
__device__ __forceinline__ void release(uint64_t* empty) {
  sync_warp();
  if (lane() == 0) mbarrier_arrive(empty);
}

// The next tile: each warp calls this once a tile.
template <typename Element, typename Tile>
__device__ __forceinline__ ForwardWork next_work(ForwardShared<Element, Tile>& s,
                                                 Cursor<2>& slot) {
  mbarrier_wait(&s.work_full[slot.at], slot.parity);
  const ForwardWork work = s.work[slot.at];
  release(&s.work_empty[slot.at]);
  slot.next();
  return work;
}

}  // namespace hopper
}  // namespace fusedformer
