// Attention's forward on Hopper: the warpgroup that feeds the others, with tiles of the schedule,
// with Q, K and V, and with the bits of dropout. attention_forward.h is where to begin.
#pragma once

#include "attention_forward_plan.h"
#include "dropout_bits.h"

namespace fusedformer {
namespace hopper {

// ---- Warp 0, one thread: tiles and loads -------------------------------------------------------

template <typename Tile>
__device__ __forceinline__ ForwardWork work_at(const Attention& p, const TileOrder& order,
                                               int index) {
  if (index >= tile_count(order)) return {-1, 0, 0, 0};
  const HeadTile tile = tile_at(order, index);
  const int batch = tile.head / p.heads;
  return {batch, tile.head % p.heads, tile.block * Tile::kQueries,
          p.key_lengths ? clamp_length(p.key_lengths[batch], p.n_keys) : p.n_keys};
}

template <typename Panel, int kPanels, int kRows>
__device__ __forceinline__ void load_panels(Panel (&panels)[kPanels][kRows], const TensorMap& map,
                                            uint64_t* full, int n, int h, int b) {
  mbarrier_expect(full, sizeof(panels));
#pragma unroll
  for (int i = 0; i < kPanels; ++i) tma_load(panels[i], map, full, i * kPanelColumns, n, h, b);
}

// Every CTA begins with a tile of its own, and then takes what is left. This runs ahead of the
// consumers, into the next tile, as far as the rings reach.
template <typename Element, typename Tile>
__device__ __forceinline__ void load_tiles(const Attention& p, const ForwardMaps& maps,
                                           const TileOrder& order,
                                           ForwardShared<Element, Tile>& s) {
  prefetch_map(maps.query);
  prefetch_map(maps.key);
  prefetch_map(maps.value);
  Cursor<2> slot;
  Cursor<1> query;
  Cursor<Tile::kStages> key, value;
  int index = block_index();
  for (;; slot.next(), query.next(), index = grid_size() + atomic_add(p.counter, 1)) {
    const ForwardWork work = work_at<Tile>(p, order, index);
    mbarrier_wait(&s.work_empty[slot.at], slot.parity ^ 1);
    s.work[slot.at] = work;
    mbarrier_arrive(&s.work_full[slot.at]);
    if (work.batch < 0) return;

    // Also for a tile that sees no key, so that every tile goes through the same phases.
    mbarrier_wait(&s.query_empty, query.parity ^ 1);
    load_panels(s.query, maps.query, &s.query_full, work.first_query, work.head, work.batch);

    // In the order in which they are used: K is wanted one block before V.
    const int key_head = work.head / (p.heads / p.key_heads), blocks = blocks_of<Tile>(p, work);
    for (int block = blocks; block >= 0; --block) {
      if (block > 0) {
        mbarrier_wait(&s.key_empty[key.at], key.parity ^ 1);
        load_panels(s.key[key.at], maps.key, &s.key_full[key.at], (block - 1) * Tile::kKeys,
                    key_head, work.batch);
        key.next();
      }
      if (block < blocks) {
        mbarrier_wait(&s.value_empty[value.at], value.parity ^ 1);
        load_panels(s.value[value.at], maps.value, &s.value_full[value.at], block * Tile::kKeys,
                    key_head, work.batch);
        value.next();
      }
    }
  }
}

// ---- The other warps: dropout bits -------------------------------------------------------------

template <typename Element, typename Tile>
__device__ __forceinline__ void make_bits(const Attention& p, ForwardShared<Element, Tile>& s) {
  constexpr int kThreads = 32 * kBitWarps<Tile>;
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  Cursor<2> slot;
  Cursor<Tile::kStages> kept;
  int turn = 0;
  for (;;) {
    const ForwardWork work = next_work(s, slot);
    if (work.batch < 0) return;
    for (int block = blocks_of<Tile>(p, work) - 1; block >= 0; --block, kept.next()) {
      mbarrier_wait(&s.kept_empty[kept.at], kept.parity ^ 1);
      // Three warps do not share a tile's rows evenly: they take turns at having fewest.
      const int thread = (thread_index() - 32 + 32 * turn) % kThreads;
      turn = (turn + 1) % kBitWarps<Tile>;
      make_dropout_bits<Tile::kQueries, Tile::kKeys, false, kThreads>(
          s.kept[kept.at], seed, p.threshold, static_cast<uint32_t>(p.offsets[0] + work.batch),
          static_cast<uint32_t>(p.offsets[1] + work.head), p.offsets[2] + work.first_query,
          p.offsets[3] + block * Tile::kKeys, thread);
      sync_warp();  // all lanes have written
      if (lane() == 0) mbarrier_arrive(&s.kept_full[kept.at]);
    }
  }
}

}  // namespace hopper
}  // namespace fusedformer
