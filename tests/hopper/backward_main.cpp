// Attention's backward in the emulator, for tests/test_hopper_backward.py, which calls it by
// ctypes: what csrc/cuda/attention_backward_launch.h does on a GPU. Compiled for one DIM, the size
// of the kernels' tile.
#include <attention_backward.h>

#include <cstdio>
#include <exception>

#include "emulator.h"

namespace fusedformer {
namespace hopper {
namespace {

using Tile = BackwardTile<DIM>;

template <typename Element, bool kDropout>
void backward(const Attention& p, const AttentionGrads& g, emulator::Launch launch) {
  const auto map_of = [&](const Tensor4& t, int heads, int length, int rows) {
    return emulator::make_tensor_map(t.data, 2, {p.batches, heads, length, p.dim},
                                     {t.batch, t.head, t.row, 1}, {1, 1, rows, kPanelColumns}, 128);
  };
  const BackwardWorkspace w = backward_workspace<Tile>(p, g.deterministic, g.workspace);
  emulator::Launch each_tile = launch;
  each_tile.grid = p.batches * p.heads * tiles_of(p.n_queries, Tile::kQueries);
  each_tile.threads = kPrepareThreads;
  emulator::run(each_tile, [&] { prepare_rows<Element, Tile>(p, g, w); });

  const BackwardMaps maps = {map_of(p.query, p.heads, p.n_queries, Tile::kQueries),
                             map_of(g.grad_out, p.heads, p.n_queries, Tile::kQueries),
                             map_of(p.key, p.key_heads, p.n_keys, Tile::kKeys),
                             map_of(p.value, p.key_heads, p.n_keys, Tile::kKeys),
                             map_of(g.grad_key, p.key_heads, p.n_keys, Tile::kKeys),
                             map_of(g.grad_value, p.key_heads, p.n_keys, Tile::kKeys)};
  const TileOrder order = backward_order<Tile>(p, g.deterministic);
  launch.grid = tile_count(order);
  launch.threads = kBackwardThreads;
  launch.shared_bytes = sizeof(BackwardShared<Element, Tile>);
  emulator::run(launch, [&] { attention_grads<Element, Tile, kDropout>(p, w, order, maps); });

  each_tile.threads = kConvertThreads;
  emulator::run(each_tile, [&] { convert_grad_query<Element, Tile>(p, g, w); });
}

}  // namespace
}  // namespace hopper
}  // namespace fusedformer

using namespace fusedformer;
using namespace fusedformer::hopper;

extern "C" {

size_t workspace_bytes(const Attention* p, bool deterministic) {
  return backward_workspace<Tile>(*p, deterministic, nullptr).bytes;
}

// Returns 0, or 1 and the error's text. `resident` blocks run at once.
int backward(const Attention* p, const AttentionGrads* g, int resident, uint64_t seed, char* error,
             size_t error_bytes) {
  emulator::Launch options;
  options.resident = resident;
  options.seed = seed;
  try {
    if (p->dtype == DType::bfloat16)
      (p->seed ? backward<__nv_bfloat16, true> : backward<__nv_bfloat16, false>)(*p, *g, options);
    else
      (p->seed ? backward<__half, true> : backward<__half, false>)(*p, *g, options);
  } catch (const std::exception& e) {
    std::snprintf(error, error_bytes, "%s", e.what());
    return 1;
  }
  return 0;
}

int first_tile(int first_key, int length, int diagonal, int n_queries, int rows) {
  return first_query_tile(first_key, length, diagonal, n_queries, rows);
}

int turn(int block, int tile, int length, int diagonal, int rows, int columns) {
  return turn_of(block, tile, length, diagonal, rows, columns);
}
}
