// Attention's backward on Hopper: what the two warpgroups of consumers do. attention_backward.h has
// the formulas, and the rest.
#pragma once

#include <math.h>

#include "attention_backward_plan.h"
#include "hopper.h"

namespace fusedformer {
namespace hopper {

constexpr float kLog2e = 1.4426950408889634f;

// As TMA sees the tensors. Boxes are panels: 64 columns by kQueries rows (query, grad_out), kKeys
// rows (the others).
struct BackwardMaps {
  TensorMap query, grad_out, key, value, grad_key, grad_value;
};

// Memory accesses of 8 and of 16 bytes.
struct alignas(8) Float2 {
  float x[2];
};
struct alignas(16) Float4 {
  float x[4];
};

enum BackwardBarrier { kBothConsumers = 1 };

// Zeros for the rows of K and V past the length: they may hold NaN, and 0 times NaN would reach dQ.
template <typename Element, typename Tile>
__device__ __forceinline__ void clear_rows(BackwardShared<Element, Tile>& s, int first) {
  constexpr int kChunks = kPanelColumns / 8;  // of 16 bytes, in a row
  const int thread = thread_index() - 128;    // of both warpgroups
  for (int i = first * kChunks + thread; i < Tile::kKeys * kChunks; i += 128 * kConsumers)
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      reinterpret_cast<Float4*>(s.keys[panel])[i] = Float4{};
      reinterpret_cast<Float4*>(s.values[panel])[i] = Float4{};
    }
  fence_async();
  barrier_sync(kBothConsumers, 128 * kConsumers);
}

// P^T in the place of S^T, 64 keys by kQueries queries. Register 4 c + 2 r + e of an
// accumulator is row 16 warp + lane / 4 + 8 r, column 8 c + 2 (lane % 4) + e.
template <int kQueries>
__device__ __forceinline__ void exponentials(float (&scores)[kQueries / 2], float scale,
                                             const float* lse) {
#pragma unroll
  for (int c = 0; c < kQueries / 8; ++c) {
    const Float2 lses = *reinterpret_cast<const Float2*>(lse + 8 * c + 2 * (lane() % 4));
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = scores[4 * c + 2 * r + e];
        x = fast_exp2(x * scale - lses.x[e]);
      }
  }
}

// Zeros for what is hidden: query i sees keys j <= i + diagonal that lie before the length. P was
// computed for all, and may be infinite where it is hidden.
template <int kQueries>
__device__ __forceinline__ void hide(float (&weights)[kQueries / 2], int first_key, int length,
                                     int diagonal, int first_query) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = first_key + 16 * (warp_index() % 4) + lane() / 4 + 8 * r;
    // The first query that sees the key, counted from this thread's first column.
    const int first = key < length ? key - diagonal - first_query - 2 * (lane() % 4) : kQueries;
#pragma unroll
    for (int c = 0; c < kQueries / 8; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (8 * c + e < first) weights[4 * c + 2 * r + e] = 0;
  }
}

// The operands of products, out of tiles of panels: the step-th 16 columns of the rows from `row`
// on, or the step-th 16 rows of the columns from those of `panel` on.
template <typename Element, int kPanels, int kRows>
__device__ __forceinline__ uint64_t rows_operand(
    const Element (&tile)[kPanels][kRows][kPanelColumns], int row, int step) {
  return k_major_descriptor(shared_address(tile[0][row])) + k_major_step(kRows, step);
}
template <typename Element, int kPanels, int kRows>
__device__ __forceinline__ uint64_t columns_operand(
    const Element (&tile)[kPanels][kRows][kPanelColumns], int panel, int step) {
  return transposed_descriptor(shared_address(tile[panel]), kRows) + transposed_step(step);
}

// Writes 64 rows from `row` on, 16 columns from `column` on: a warpgroup's operand, to such a tile.
template <typename Element, int kPanels, int kRows>
__device__ __forceinline__ void store_operand(Element (&tile)[kPanels][kRows][kPanelColumns],
                                              int row, int column, const uint32_t (&operand)[4]) {
  const int byte =
      tile_byte(kRows, row + 16 * (warp_index() % 4) + lane() % 16, column + 8 * (lane() / 16));
  store_matrices(reinterpret_cast<unsigned char*>(tile) + byte, operand);
}

// The first kColumns of a gradient of 64 keys, times a factor, to shared memory.
template <typename Element, int kColumns, int kPanels, int kRows, int kRegisters>
__device__ __forceinline__ void stage_grads(Element (&tile)[kPanels][kRows][kPanelColumns], int row,
                                            int column, const float (&grad)[kRegisters],
                                            float factor) {
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] = pack<Element>(grad[8 * step + 2 * i] * factor,
                               grad[8 * step + 2 * i + 1] * factor);
    store_operand(tile, row, column + 16 * step, words);
  }
}

// dK or dV += P^T or dS^T times dO or Q: over the queries of a tile. The left operand is in
// registers where the warpgroup has it whole, else in shared memory.
template <typename Element, typename Tile, int kLeftPanels, int kPanels>
__device__ __forceinline__ void add_product(
    float (&grad)[Tile::kProducts / 2], const uint32_t (&left)[Tile::kScores / 16][4],
    const Element (&shared_left)[kLeftPanels][Tile::kKeys][kPanelColumns],
    const Element (&right)[kPanels][Tile::kQueries][kPanelColumns], int panel) {
#pragma unroll
  for (int step = 0; step < Tile::kQueries / 16; ++step) {
    const uint64_t columns = columns_operand(right, panel, step);
    if constexpr (Tile::kSplitsKeys)
      wgmma_rs<Tile::kProducts, Element, true>(grad, left[step], columns, true);
    else
      wgmma_ss<Tile::kProducts, Element, false, true>(grad, rows_operand(shared_left, 0, step),
                                                      columns, true);
  }
}

template <typename Element, typename Tile, bool kDropout>
__device__ __forceinline__ void sum_grads(const Attention& p, const BackwardMaps& maps,
                                          const KeyBlock& k, BackwardShared<Element, Tile>& s) {
  constexpr int kDim = Tile::kDim, kColumns = Tile::kColumns;
  constexpr int kScores = Tile::kScores;  // queries of this warpgroup's S^T
  const int consumer = warp_index() / 4 - 1;
  // What of the block and of the tiles is this warpgroup's: 64 keys from `row` on, or the queries
  // from `query` and the columns from those of `panel` on.
  const int row = Tile::kSplitsKeys ? 64 * consumer : 0;
  const int query = Tile::kSplitsKeys ? 0 : kScores * consumer;
  const int panel = Tile::kSplitsKeys ? 0 : Tile::kSlabPanels * consumer;
  const float scale_log2 = p.scale * kLog2e;
  float grad_key[Tile::kProducts / 2], grad_value[Tile::kProducts / 2];
#pragma unroll
  for (int i = 0; i < Tile::kProducts / 2; ++i) grad_key[i] = grad_value[i] = 0;

  mbarrier_wait(&s.key_values_full, 0);
  if (k.length < k.first_key + Tile::kKeys)
    clear_rows(s, k.length > k.first_key ? k.length - k.first_key : 0);

  for (int t = 0; t < k.visits; ++t) {
    const int stage = t % Tile::kStages;
    const int first_query = visit_of(p, k, t).tile * Tile::kQueries + query;
    mbarrier_wait(&s.full[stage], t / Tile::kStages % 2);

    float scores[kScores / 2], grad_weights[kScores / 2];
    wgmma_fence(scores, grad_weights);
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step)
      wgmma_ss<kScores, Element>(
          scores, rows_operand(s.keys, row, panel_step<Tile>(step)),
          rows_operand(s.queries[stage], query, panel_step<Tile>(step)), step > 0);
    wgmma_commit();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step)
      wgmma_ss<kScores, Element>(
          grad_weights, rows_operand(s.values, row, panel_step<Tile>(step)),
          rows_operand(s.grad_outs[stage], query, panel_step<Tile>(step)), step > 0);
    wgmma_commit();

    // P, while dP is on its way.
    wgmma_wait<1>(scores);
    exponentials<kScores>(scores, scale_log2, s.rows[stage][0] + query);
    if (k.first_key + row + 64 > k.length || k.first_key + row + 63 - k.diagonal > first_query)
      hide<kScores>(scores, k.first_key + row, k.length, k.diagonal, first_query);

    // Both as operands of products over queries, in 16 bits: operand k is queries 16 k to 16 k +
    // 15. What dV is to have of P is dropped, what dS has is not. Bit i of `kept` is register i's.
    uint32_t weights[kScores / 16][4], grad_scores[kScores / 16][4];
    uint32_t kept[dropout_words(kScores)];
    const auto load_kept = [&] {
      const int at = dropout_word(Tile::kQueries, row / 16 + warp_index() % 4, lane());
#pragma unroll
      for (int i = 0; i < dropout_words(kScores); ++i)
        kept[i] = kDropout ? s.kept[stage][at + i] >> query / 2 : 0xFFFFFFFF;
    };
    const auto pack_weights = [&](int c, int r) {
      const int i = 4 * c + 2 * r;
      weights[c / 2][c % 2 * 2 + r] =
          pack<Element>(dropout_kept(kept, i) ? scores[i] : 0.f,
                        dropout_kept(kept, i + 1) ? scores[i + 1] : 0.f);
    };
    auto& shared_weights = s.weights[t % 2];
    const auto add_grad_value = [&] {
      wgmma_fence(grad_value, weights);
      add_product<Element, Tile>(grad_value, weights, shared_weights, s.grad_outs[stage], panel);
      wgmma_commit();
    };
    // Best while dS is being computed. But then P is there in 32 and in 16 bits: of 128 queries
    // that is too much, and of 64, too, where dropout takes registers (see attention_grads).
    constexpr bool kValueFirst = Tile::kSplitsKeys && Tile::kQueries == 64 && !kDropout;
    if constexpr (kValueFirst) {
      load_kept();
#pragma unroll
      for (int c = 0; c < kScores / 8; ++c)
#pragma unroll
        for (int r = 0; r < 2; ++r) pack_weights(c, r);
      add_grad_value();
    }

    // dS = P o (M o dP - shift). A choice of products, as one of factors takes more registers.
    wgmma_wait<kValueFirst ? 1 : 0>(grad_weights);
    if constexpr (!kValueFirst) load_kept();
#pragma unroll
    for (int c = 0; c < kScores / 8; ++c) {
      const Float2 shifts =
          *reinterpret_cast<const Float2*>(s.rows[stage][1] + query + 8 * c + 2 * (lane() % 4));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = 4 * c + 2 * r + e;
          const float scaled = kDropout ? grad_weights[i] * p.inverse_keep : grad_weights[i];
          pair[e] = dropout_kept(kept, i) ? scores[i] * (scaled - shifts.x[e])
                                          : scores[i] * -shifts.x[e];
        }
        grad_scores[c / 2][c % 2 * 2 + r] = pack<Element>(pair[0], pair[1]);
        if constexpr (!kValueFirst) pack_weights(c, r);
      }
    }
    if constexpr (Tile::kSplitsKeys && !kValueFirst) add_grad_value();

    // dS to shared memory, where both warpgroups read all of it. A warpgroup gets to the barrier
    // only when its products of the tile before are done, so that two buffers are enough.
    auto& shared_grads = s.grad_scores[t % 2];
#pragma unroll
    for (int step = 0; step < kScores / 16; ++step) {
      store_operand(shared_grads, row, query + 16 * step, grad_scores[step]);
      if constexpr (!Tile::kSplitsKeys)
        store_operand(shared_weights, row, query + 16 * step, weights[step]);
    }
    fence_async();
    barrier_sync(kBothConsumers, 128 * kConsumers);
    if constexpr (!Tile::kSplitsKeys) add_grad_value();

    float grad_query[Tile::kPartProducts / 2];
    wgmma_fence(grad_query);
#pragma unroll
    for (int step = 0; step < Tile::kKeys / 16; ++step)
      wgmma_ss<Tile::kPartProducts, Element, true, true>(
          grad_query,
          columns_operand(shared_grads, Tile::kPartsAreColumns ? 0 : consumer, step),
          columns_operand(s.keys, Tile::kSplitsKeys && Tile::kPartsAreColumns ? consumer : panel,
                          step),
          step > 0);
    wgmma_commit();

    wgmma_fence(grad_key, grad_scores);
    add_product<Element, Tile>(grad_key, grad_scores, shared_grads, s.queries[stage], panel);
    wgmma_commit();

    wgmma_wait<1>(grad_query, weights);
    mbarrier_wait(&s.grad_query_empty[consumer], (t + 1) % 2);
    Float4* const staged = reinterpret_cast<Float4*>(s.grad_queries[consumer]);
#pragma unroll
    for (int c = 0; c < Tile::kPartColumns / 8; ++c)
      staged[128 * c + thread_index() % 128] = {grad_query[4 * c], grad_query[4 * c + 1],
                                                grad_query[4 * c + 2], grad_query[4 * c + 3]};
    fence_async();
    mbarrier_arrive(&s.grad_query_full[consumer]);

    wgmma_wait<0>(grad_key, grad_value, grad_scores);
    sync_warp();
    if (lane() == 0) mbarrier_arrive(&s.empty[stage]);
  }

  // dK and dV leave through the room of K and V, once neither warpgroup reads these any more. There
  // the columns lie without gaps.
  barrier_sync(kBothConsumers, 128 * kConsumers);
  const int column = Tile::kSplitsKeys ? 0 : kColumns * consumer;
  stage_grads<Element, kColumns>(s.keys, row, column, grad_key, p.scale);
  stage_grads<Element, kColumns>(s.values, row, column, grad_value,
                                 kDropout ? p.inverse_keep : 1.f);
  fence_async();
  barrier_sync(kBothConsumers, 128 * kConsumers);
  if (thread_index() % 128 == 0) {  // one thread sends dK, one dV
    for (int i = 0; i < panels(kDim); ++i) {
      const auto& grad = consumer == 0 ? s.keys : s.values;
      tma_store(consumer == 0 ? maps.grad_key : maps.grad_value, grad[i], i * kPanelColumns,
                k.first_key, k.key_head, k.batch);
    }
    tma_commit();
    tma_wait_read<0>();
  }
}

}  // namespace hopper
}  // namespace fusedformer
