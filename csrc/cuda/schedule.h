// In what order tiles of attention are taken, and which blocks of keys a tile of queries needs.
// Pure integer arithmetic, for host and device.
//
// A tile is `rows` queries of one head. CTAs take tiles from a counter, so a good order is all
// there is to balance: the longest tiles first, that the short ones fill the gaps at the end. But
// tiles that run at one time should also share keys and values in the L2 cache. So heads are cut
// into sections whose K and V fit there together, and longest-first holds within a section.
#pragma once

#include "../philox.h"  // FUSEDFORMER_HOST_DEVICE

namespace fusedformer {
namespace hopper {

struct TileOrder {
  int heads;          // B H: every query head of every batch
  int section_heads;  // of these, how many are a section; the last section may have fewer
  int blocks;         // tiles of a head
  bool last_first;    // the last tile of a head is its longest, or its first one is
};

struct HeadTile {
  int head;   // batch H + head
  int block;  // which tile of that head
};

// Of the 50 MB of an H100's or H200's L2, what a section's keys and values may take.
constexpr long long kSectionBytes = 32 << 20;

// The order for tiles of `rows` queries out of n_queries. head_bytes: K and V of one head of keys;
// a section holds whole groups, the query heads that share one head of keys.
FUSEDFORMER_HOST_DEVICE TileOrder tile_order(int batches, int heads, int key_heads, int n_queries,
                                             int rows, long long head_bytes, bool last_first) {
  const int groups = batches * key_heads;
  const long long fit = head_bytes > 0 ? kSectionBytes / head_bytes : groups;
  const int section_groups = fit < 1 ? 1 : fit < groups ? static_cast<int>(fit) : groups;
  return {batches * heads, section_groups * (heads / key_heads), (n_queries + rows - 1) / rows,
          last_first};
}

FUSEDFORMER_HOST_DEVICE int tile_count(const TileOrder& order) {
  return order.heads * order.blocks;
}

// The tile that is taken as the index-th.
FUSEDFORMER_HOST_DEVICE HeadTile tile_at(const TileOrder& order, int index) {
  const int section_tiles = order.section_heads * order.blocks;
  const int first_head = index / section_tiles * order.section_heads;
  const int heads = order.heads - first_head < order.section_heads ? order.heads - first_head
                                                                   : order.section_heads;
  const int within = index % section_tiles;
  const int rank = within / heads;  // 0 for the longest tiles of the section's heads
  return {first_head + within % heads, order.last_first ? order.blocks - 1 - rank : rank};
}

// Query i sees the keys j < min(length, i + 1 + diagonal). diagonal lies in -n_queries to n_keys,
// so that no sum overflows.

// A length as it was given, made one that can be used.
FUSEDFORMER_HOST_DEVICE int clamp_length(int length, int n_keys) {
  return length < 0 ? 0 : length < n_keys ? length : n_keys;
}

// Where the keys end that query i sees; never below 0.
FUSEDFORMER_HOST_DEVICE int visible_keys(int i, int length, int diagonal) {
  const int end = i + 1 + diagonal;
  return end < 0 ? 0 : end < length ? end : length;
}

// How many blocks of `columns` keys the queries before end_query need: no key further on is seen.
FUSEDFORMER_HOST_DEVICE int key_blocks(int end_query, int length, int diagonal, int columns) {
  return (visible_keys(end_query - 1, length, diagonal) + columns - 1) / columns;
}

// How many of these blocks every query from first_query on sees whole: they need no mask.
FUSEDFORMER_HOST_DEVICE int whole_key_blocks(int first_query, int length, int diagonal,
                                             int columns) {
  return visible_keys(first_query, length, diagonal) / columns;
}

}  // namespace hopper
}  // namespace fusedformer
