// Other choices for attention's forward than those of ForwardTile, each to be measured beside it:
// in a library of its own, which nothing but `python -m fusedformer.benchmarks.tune_cuda` builds.
#pragma once

#include "../attention_forward_plan.h"

namespace fusedformer {
namespace hopper {

// Tiles of 192 queries, as FlashAttention-3 has at D = 64: K and V are read less often, and three
// softmaxes lie under one another's products.
struct ThreeConsumers : ForwardTile<64> {
  static constexpr int kConsumers = 3, kQueries = 192;
  static constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
};

// No ping-pong, as in FlashAttention-3 beyond D = 128: a consumer's own overlap may be enough.
template <int kDimension>
struct WithoutTurns : ForwardTile<kDimension> {
  static constexpr bool kTurns = false;
};

// A third buffer for K, V and bits. Beyond D = 64 there is no room.
struct ThreeStages : ForwardTile<64> {
  static constexpr int kStages = 3;
};

// Seven warps that make bits, for three: one alone on its scheduler waits for its own results.
template <int kDimension>
struct TwoProducers : ForwardTile<kDimension> {
  static constexpr int kProducers = 2;
  static constexpr int kConsumerRegisters = 216;
};

// Blocks of 176 keys at D = 128, as FlashAttention-3 has without a causal mask: fewer rescalings
// and turns. O leaves through Q's room.
struct WiderBlocks : ForwardTile<128> {
  static constexpr int kKeys = 176;
  static constexpr bool kOwnOut = false;
};

// O of D = 96 in a product of 96 columns, not 128, if wgmma takes it: see kPartialPanels.
struct PartialPanels : ForwardTile<96> {
  static constexpr int kOutDim = product_columns(96, true);
};

}  // namespace hopper
}  // namespace fusedformer
