// Attention's forward kernel in the emulator, for tests/test_hopper_forward.py, which calls it by
// ctypes. Compiled for one TILE.
#include <attention_forward.h>
#include <variants/forward_variants.h>

#include <cstdio>
#include <exception>

#include "emulator.h"

namespace fusedformer {
namespace hopper {
namespace {

using Tile = TILE;

TensorMap map_of(const Tensor4& tensor, const Attention& p, int heads, int length, int rows) {
  return emulator::make_tensor_map(tensor.data, 2, {p.batches, heads, length, p.dim},
                                   {tensor.batch, tensor.head, tensor.row, 1}, {1, 1, rows, 64},
                                   128);
}

template <typename Element, bool kDropout>
void launch(const Attention& p, emulator::Launch launch) {
  launch.threads = kForwardThreads<Tile>;
  launch.shared_bytes = sizeof(ForwardShared<Element, Tile>);
  const ForwardMaps maps = {map_of(p.query, p, p.heads, p.n_queries, Tile::kQueries),
                            map_of(p.key, p, p.key_heads, p.n_keys, Tile::kKeys),
                            map_of(p.value, p, p.key_heads, p.n_keys, Tile::kKeys),
                            map_of(p.out, p, p.heads, p.n_queries, 64)};
  const TileOrder order = forward_order<Tile>(p);
  emulator::run(launch, [&] { attention_forward_kernel<Element, Tile, kDropout>(p, maps, order); });
}

}  // namespace
}  // namespace hopper
}  // namespace fusedformer

// Returns 0, or 1 and the error's text. `resident` blocks run at once, of `grid`.
extern "C" int forward(const fusedformer::hopper::Attention* given, int grid, int resident,
                       uint64_t seed, char* error, size_t error_bytes) {
  using namespace fusedformer;
  using namespace fusedformer::hopper;
  Attention p = *given;
  emulator::Launch options;
  options.grid = grid;
  options.resident = resident;
  options.seed = seed;
  try {
    if (p.dtype == DType::bfloat16)
      (p.seed ? launch<__nv_bfloat16, true> : launch<__nv_bfloat16, false>)(p, options);
    else
      (p.seed ? launch<__half, true> : launch<__half, false>)(p, options);
  } catch (const std::exception& e) {
    std::snprintf(error, error_bytes, "%s", e.what());
    return 1;
  }
  return 0;
}
