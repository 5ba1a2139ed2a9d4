// The order of attention's tiles, for tests/test_hopper_schedule.py, which calls it by ctypes.
#include "../../csrc/cuda/schedule.h"

using namespace fusedformer::hopper;

extern "C" {

// Fills heads and blocks with the tiles in their order, no more than limit; returns how many tiles
// there are, and how many heads a section has.
int order_of_tiles(int batches, int heads, int key_heads, int n_queries, int rows,
                   long long head_bytes, int last_first, int limit, int* head, int* block,
                   int* section_heads) {
  const TileOrder order =
      tile_order(batches, heads, key_heads, n_queries, rows, head_bytes, last_first != 0);
  for (int index = 0; index < tile_count(order) && index < limit; ++index) {
    const HeadTile tile = tile_at(order, index);
    head[index] = tile.head;
    block[index] = tile.block;
  }
  *section_heads = order.section_heads;
  return tile_count(order);
}

void blocks_of_keys(int first_query, int end_query, int length, int n_keys, int diagonal,
                    int columns, int* needed, int* whole) {
  length = clamp_length(length, n_keys);
  *needed = key_blocks(end_query, length, diagonal, columns);
  *whole = whole_key_blocks(first_query, length, diagonal, columns);
}
}
