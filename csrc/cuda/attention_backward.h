// Attention's backward on Hopper: the kernels. FlashAttention-2 (Dao 2023), algorithm 2, in the
// structure of FlashAttention-3 (Shah et al. 2024) and with dropout.
//
//   prepare_rows          for each query: LSE, and shift = rowsum(dO o O) - dLSE; clears the sums of dQ
//   attention_grads       one CTA for each block of keys: dK and dV, and what it adds to dQ
//   convert_grad_query    dQ from fp32 sums to the tensor
//
// With M the dropout mask (0, or 1 / (1 - p)) and scores kept transposed, keys by queries:
//
//   S^T = K Q^T            P^T  = exp(scale S^T - LSE)
//   dP^T = V dO^T          dS^T = P^T o (M o dP^T - shift)
//   dV = (P o M)^T dO      dK = scale dS^T Q      dQ = scale dS K
//
// Transposed, because P^T and dS^T then come out of the tensor cores with the rows that dV and dK ask
// for: they stay in registers, as left operands of these products. Only dQ, which sums over keys and
// so over both warpgroups, needs dS in shared memory.
//
// Warps of a CTA: warp 0 loads tiles (TMA), warp 1 sends dQ away, warps 2 and 3 make dropout bits;
// two warpgroups of "consumers" do the rest, each for 64 keys.
#pragma once

#include <math.h>

#include "attention_backward_plan.h"
#include "dropout_bits.h"
#include "hopper.h"
#include "layouts.h"

namespace fusedformer {
namespace hopper {

constexpr float kLog2e = 1.4426950408889634f;

// As TMA sees the tensors. Boxes are panels: 64 columns by kQueries rows (query, grad_out), kKeys
// rows (key, value) or 64 rows (grad_key, grad_value).
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
template <typename Element>
struct alignas(16) Element8 {
  Element x[8];
};

template <typename Element>
__device__ __forceinline__ Element* row_of(const Tensor4& t, int b, int h, int n) {
  return static_cast<Element*>(t.data) + b * t.batch + h * t.head + n * t.row;
}

// ---- Before: one CTA for each tile of queries ---------------------------------------------------

constexpr int kPrepareThreads = 128;

template <typename Element, typename Tile>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_rows(const Attention p, const AttentionGrads g, const BackwardWorkspace w) {
  constexpr int kLanes = Tile::kDim <= 64 ? 8 : Tile::kDim <= 128 ? 16 : 32;  // for one row
  constexpr int kFloats = Tile::kQueries * Tile::kDim;
  const int tiles = tiles_of(p.n_queries, Tile::kQueries);
  const int tile = block_index() % tiles, batch_head = block_index() / tiles;
  const int b = batch_head / p.heads, h = batch_head % p.heads;
  float* const lse = w.rows + static_cast<int64_t>(block_index()) * 2 * Tile::kQueries;
  float* const shift = lse + Tile::kQueries;

  for (int row = thread_index() / kLanes; row < Tile::kQueries; row += kPrepareThreads / kLanes) {
    const int n = tile * Tile::kQueries + row, d = thread_index() % kLanes * 8;
    float sum = 0;
    if (n < p.n_queries && d < p.dim) {
      const auto o = *reinterpret_cast<Element8<Element>*>(row_of<Element>(p.out, b, h, n) + d);
      const auto grad =
          *reinterpret_cast<Element8<Element>*>(row_of<Element>(g.grad_out, b, h, n) + d);
#pragma unroll
      for (int k = 0; k < 8; ++k) sum += to_float(o.x[k]) * to_float(grad.x[k]);
    }
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (thread_index() % kLanes == 0) {
      const int64_t at = static_cast<int64_t>(batch_head) * p.n_queries + n;
      const bool empty = n >= p.n_queries || p.lse[at] == -INFINITY;
      // A row that saw no key, or that is none, gets P = exp2(finite - inf) = 0.
      lse[row] = empty ? INFINITY : p.lse[at] * kLog2e;
      shift[row] = empty ? 0 : g.grad_lse ? sum - g.grad_lse[at] : sum;
    }
  }
  Float4* const sums = reinterpret_cast<Float4*>(w.grad_query + static_cast<int64_t>(block_index()) * kFloats);
  for (int i = thread_index(); i < kFloats / 4; i += kPrepareThreads) sums[i] = Float4{};
  if (w.turns && thread_index() == 0) {
    w.turns[block_index()] = 0;
    if (block_index() == 0) *w.ticket = 0;
  }
}

// ---- Which block of keys, which tiles of queries -------------------------------------------------

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
__device__ __forceinline__ KeyBlock key_block(const Attention& p, const TileOrder& order,
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

__device__ __forceinline__ Visit visit_of(const Attention& p, const KeyBlock& k, int t) {
  const int per_head = k.tiles - k.first_tile;
  Visit v;
  v.head = k.key_head * (p.heads / p.key_heads) + t / per_head;
  v.tile = k.first_tile + t % per_head;
  v.at = (static_cast<int64_t>(k.batch) * p.heads + v.head) * k.tiles + v.tile;
  return v;
}

// ---- Warp 0, one thread: loads -------------------------------------------------------------------

template <typename Element, typename Tile>
__device__ __forceinline__ void load_tiles(const Attention& p, const BackwardMaps& maps,
                                           const BackwardWorkspace& w, const KeyBlock& k,
                                           BackwardShared<Element, Tile>& s) {
  mbarrier_expect(&s.key_values_full, sizeof(s.keys) + sizeof(s.values));
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    const int d = panel * kPanelColumns;
    tma_load(s.keys[panel], maps.key, &s.key_values_full, d, k.first_key, k.key_head, k.batch);
    tma_load(s.values[panel], maps.value, &s.key_values_full, d, k.first_key, k.key_head, k.batch);
  }
  for (int t = 0; t < k.visits; ++t) {
    const int stage = t % Tile::kStages;
    const Visit v = visit_of(p, k, t);
    const int n = v.tile * Tile::kQueries;
    uint64_t* const full = &s.full[stage];
    mbarrier_wait(&s.empty[stage], (t / Tile::kStages + 1) % 2);
    mbarrier_expect(full, sizeof(s.queries[0]) + sizeof(s.grad_outs[0]) + sizeof(s.rows[0]));
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const int d = panel * kPanelColumns;
      tma_load(s.queries[stage][panel], maps.query, full, d, n, v.head, k.batch);
      tma_load(s.grad_outs[stage][panel], maps.grad_out, full, d, n, v.head, k.batch);
    }
    bulk_load(s.rows[stage], w.rows + v.at * 2 * Tile::kQueries, sizeof(s.rows[0]), full);
  }
}

// ---- Warp 1, one thread: dQ ----------------------------------------------------------------------

// Adds the parts of dQ that the consumers have staged to the workspace. Many CTAs add to one tile, in
// any order, unless they take turns.
template <typename Element, typename Tile>
__device__ __forceinline__ void add_grad_queries(const Attention& p, const BackwardWorkspace& w,
                                                 const KeyBlock& k,
                                                 BackwardShared<Element, Tile>& s) {
  for (int t = 0; t < k.visits; ++t) {
    const Visit v = visit_of(p, k, t);
    float* const sums = w.grad_query + v.at * Tile::kQueries * Tile::kDim;
    if (w.turns) {
      const int turn =
          turn_of(k.block, v.tile, k.length, k.diagonal, Tile::kQueries, Tile::kKeys);
      while (load_acquire(w.turns + v.at) != turn) {
      }
    }
    for (int part = 0; part < kConsumers; ++part) {
      mbarrier_wait(&s.grad_query_full[part], t % 2);
      bulk_reduce_add(sums + part * kPartFloats, s.grad_queries[part],
                      part_floats<Tile>(part) * sizeof(float));
      tma_commit();
      tma_wait_read<0>();
      mbarrier_arrive(&s.grad_query_empty[part]);
    }
    if (w.turns) {
      tma_wait<0>();  // the sums are there, not merely on their way
      add_release(w.turns + v.at, 1);
    }
  }
  tma_wait<0>();
}

// ---- Warps 2 and 3: dropout bits -----------------------------------------------------------------

constexpr int kDropoutWarps = 2;

template <typename Element, typename Tile>
__device__ __forceinline__ void make_bits(const Attention& p, const KeyBlock& k,
                                          BackwardShared<Element, Tile>& s) {
  const int thread = thread_index() - 2 * 32;
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  for (int t = 0; t < k.visits; ++t) {
    const int stage = t % Tile::kStages;
    const Visit v = visit_of(p, k, t);
    mbarrier_wait(&s.empty[stage], (t / Tile::kStages + 1) % 2);
    make_dropout_bits<Tile::kKeys, Tile::kQueries, true>(
        s.kept[stage], seed, p.threshold, static_cast<uint32_t>(p.offsets[0] + k.batch),
        static_cast<uint32_t>(p.offsets[1] + v.head), p.offsets[3] + k.first_key,
        p.offsets[2] + v.tile * Tile::kQueries, thread, 32 * kDropoutWarps);
    sync_warp();
    if (lane() == 0) mbarrier_arrive(&s.full[stage]);
  }
}

// ---- Consumers -----------------------------------------------------------------------------------

enum BackwardBarrier { kBothConsumers = 1, kOneConsumer = 2 };  // and 3: one for each warpgroup

// Zeros for the rows of K and V past the length: they may hold NaN, and 0 times NaN would reach dQ.
// Each warpgroup clears its own 64 rows.
template <typename Element, typename Tile>
__device__ __forceinline__ void clear_rows(BackwardShared<Element, Tile>& s, int first, int rows) {
  constexpr int kChunks = kPanelColumns / 8;  // of 16 bytes
  for (int i = first * kChunks + thread_index() % 128; i < rows * kChunks; i += 128)
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      reinterpret_cast<Float4*>(s.keys[panel])[i] = Float4{};
      reinterpret_cast<Float4*>(s.values[panel])[i] = Float4{};
    }
  fence_async();
}

// P^T in the place of S^T, for 64 keys and a tile of queries. Register 4 c + 2 r + e of an
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

// The operands of products, out of tiles of panels: the step-th 16 columns of the rows from `row` on,
// or the step-th 16 rows of the columns from those of `panel` on.
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

// A gradient of 64 keys, times a factor, to shared memory.
template <typename Element, int kDim, int kPanels, int kRows>
__device__ __forceinline__ void stage_grads(Element (&tile)[kPanels][kRows][kPanelColumns], int row,
                                            const float (&grad)[kDim / 2], float factor) {
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] = pack<Element>(grad[8 * step + 2 * i] * factor, grad[8 * step + 2 * i + 1] * factor);
    store_operand(tile, row, 16 * step, words);
  }
}

template <typename Element, typename Tile, bool kDropout>
__device__ __forceinline__ void sum_grads(const Attention& p, const BackwardMaps& maps,
                                          const KeyBlock& k, BackwardShared<Element, Tile>& s) {
  constexpr int kQueries = Tile::kQueries, kDim = Tile::kDim;
  const int consumer = warp_index() / 4 - 1;  // which warpgroup
  const int row = 64 * consumer;              // its first key in the block
  const float scale_log2 = p.scale * kLog2e;
  float grad_key[kDim / 2], grad_value[kDim / 2];
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) grad_key[i] = grad_value[i] = 0;

  mbarrier_wait(&s.key_values_full, 0);
  if (k.length < k.first_key + row + 64) {
    const int left = k.length - k.first_key;
    clear_rows(s, left > row ? left : row, row + 64);
    barrier_sync(kOneConsumer + consumer, 128);
  }

  for (int t = 0; t < k.visits; ++t) {
    const int stage = t % Tile::kStages;
    const int first_query = visit_of(p, k, t).tile * kQueries;
    mbarrier_wait(&s.full[stage], t / Tile::kStages % 2);

    float scores[kQueries / 2], grad_weights[kQueries / 2];
    wgmma_fence(scores, grad_weights);
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step)
      wgmma_ss<kQueries, Element>(scores, rows_operand(s.keys, row, step),
                                  rows_operand(s.queries[stage], 0, step), step > 0);
    wgmma_commit();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step)
      wgmma_ss<kQueries, Element>(grad_weights, rows_operand(s.values, row, step),
                                  rows_operand(s.grad_outs[stage], 0, step), step > 0);
    wgmma_commit();

    // P, while dP is on its way. What dV is to have of it is dropped, what dS has is not.
    wgmma_wait<1>(scores);
    exponentials<kQueries>(scores, scale_log2, s.rows[stage][0]);
    if (k.first_key + row + 64 > k.length || k.first_key + row + 63 - k.diagonal > first_query)
      hide<kQueries>(scores, k.first_key + row, k.length, k.diagonal, first_query);
    uint32_t weights[kQueries / 16][4], grad_scores[kQueries / 16][4];
    const auto add_grad_value = [&] {
      wgmma_fence(grad_value, weights);
#pragma unroll
      for (int step = 0; step < kQueries / 16; ++step)
        wgmma_rs<kDim, Element, true>(grad_value, weights[step],
                                      columns_operand(s.grad_outs[stage], 0, step), true);
      wgmma_commit();
    };
    // Bit i of a thread's bits is register i of its accumulator.
    uint32_t kept[dropout_words(kQueries)];
    const auto load_kept = [&] {
      const int at = dropout_word(kQueries, 4 * consumer + warp_index() % 4, lane());
#pragma unroll
      for (int i = 0; i < dropout_words(kQueries); ++i)
        kept[i] = kDropout ? s.kept[stage][at + i] : 0xFFFFFFFF;
    };
    const auto pack_weights = [&](int c, int r) {
      const int i = 4 * c + 2 * r;
      weights[c / 2][c % 2 * 2 + r] =
          pack<Element>(dropout_kept(kept, i) ? scores[i] : 0.f,
                        dropout_kept(kept, i + 1) ? scores[i + 1] : 0.f);
    };
    // Best while dS is being computed; but 128 queries leave no registers for P in 32 and in 16 bits.
    constexpr bool kValueFirst = kQueries == 64;
    if constexpr (kValueFirst) {
      load_kept();
#pragma unroll
      for (int c = 0; c < kQueries / 8; ++c)
#pragma unroll
        for (int r = 0; r < 2; ++r) pack_weights(c, r);
      add_grad_value();
    }

    // dS = P o (M o dP - shift).
    wgmma_wait<kValueFirst ? 1 : 0>(grad_weights);
    if constexpr (!kValueFirst) load_kept();
#pragma unroll
    for (int c = 0; c < kQueries / 8; ++c) {
      const Float2 shifts =
          *reinterpret_cast<const Float2*>(s.rows[stage][1] + 8 * c + 2 * (lane() % 4));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = 4 * c + 2 * r + e;
          const float scaled = kDropout ? grad_weights[i] * p.inverse_keep : grad_weights[i];
          const float shifted = scaled - shifts.x[e];
          pair[e] = dropout_kept(kept, i) ? scores[i] * shifted : scores[i] * -shifts.x[e];
        }
        grad_scores[c / 2][c % 2 * 2 + r] = pack<Element>(pair[0], pair[1]);
        if constexpr (!kValueFirst) pack_weights(c, r);
      }
    }
    if constexpr (!kValueFirst) add_grad_value();

    // dS to shared memory, where both warpgroups read all of it. A warpgroup gets to the barrier only
    // when its dQ of the tile before is done, so that two buffers are enough.
    auto& shared_grads = s.grad_scores[t % 2];
#pragma unroll
    for (int step = 0; step < kQueries / 16; ++step)
      store_operand(shared_grads, row, 16 * step, grad_scores[step]);
    fence_async();
    barrier_sync(kBothConsumers, 128 * kConsumers);

    float grad_query[kPartFloats / 128];
    wgmma_fence(grad_query);
#pragma unroll
    for (int step = 0; step < Tile::kKeys / 16; ++step)
      wgmma_ss<kPanelColumns, Element, true, true>(
          grad_query, columns_operand(shared_grads, kPartsAreColumns<Tile> ? 0 : consumer, step),
          columns_operand(s.keys, kPartsAreColumns<Tile> ? consumer : 0, step), step > 0);
    wgmma_commit();

    wgmma_fence(grad_key, grad_scores);
#pragma unroll
    for (int step = 0; step < kQueries / 16; ++step)
      wgmma_rs<kDim, Element, true>(grad_key, grad_scores[step],
                                    columns_operand(s.queries[stage], 0, step), true);
    wgmma_commit();

    wgmma_wait<1>(grad_query, weights);
    mbarrier_wait(&s.grad_query_empty[consumer], (t + 1) % 2);
    Float4* const staged = reinterpret_cast<Float4*>(s.grad_queries[consumer]);
#pragma unroll
    for (int c = 0; c < kPanelColumns / 8; ++c)
      staged[128 * c + thread_index() % 128] = {grad_query[4 * c], grad_query[4 * c + 1],
                                                grad_query[4 * c + 2], grad_query[4 * c + 3]};
    fence_async();
    mbarrier_arrive(&s.grad_query_full[consumer]);

    wgmma_wait<0>(grad_key, grad_value, grad_scores);
    sync_warp();
    if (lane() == 0) mbarrier_arrive(&s.empty[stage]);
  }

  // dK and dV leave through the room of K and V, which the other warpgroup may still be reading.
  barrier_sync(kBothConsumers, 128 * kConsumers);
  stage_grads<Element, kDim>(s.keys, row, grad_key, p.scale);
  stage_grads<Element, kDim>(s.values, row, grad_value, kDropout ? p.inverse_keep : 1.f);
  fence_async();
  barrier_sync(kOneConsumer + consumer, 128);
  if (thread_index() % 128 == 0) {
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const int d = panel * kPanelColumns, n = k.first_key + row;
      tma_store(maps.grad_key, s.keys[panel][row], d, n, k.key_head, k.batch);
      tma_store(maps.grad_value, s.values[panel][row], d, n, k.key_head, k.batch);
    }
    tma_commit();
    tma_wait_read<0>();
  }
}

// ---- The kernel ----------------------------------------------------------------------------------

template <typename Element, typename Tile, bool kDropout>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    attention_grads(const Attention p, const BackwardWorkspace w, const TileOrder order,
                    const __grid_constant__ BackwardMaps maps) {
  auto& s = *reinterpret_cast<BackwardShared<Element, Tile>*>(shared_memory());
  if (thread_index() == 0) {
    // With turns a CTA waits for others. Numbers drawn here, unlike block indices, are sure to have
    // been drawn by CTAs that run, so that those with lower ones will come to their end.
    s.work = w.ticket ? atomic_add(w.ticket, 1) : block_index();
    mbarrier_init(&s.key_values_full, 1);
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      mbarrier_init(&s.full[stage], 1 + (kDropout ? kDropoutWarps : 0));
      mbarrier_init(&s.empty[stage], 4 * kConsumers);  // one of each warp
    }
    for (int part = 0; part < kConsumers; ++part) {
      mbarrier_init(&s.grad_query_full[part], 128);
      mbarrier_init(&s.grad_query_empty[part], 1);
    }
    mbarrier_init_fence();
  }
  sync_threads();
  const KeyBlock k = key_block<Tile>(p, order, s.work);

  if (warp_index() < 4) {
    registers_down<32>();
    if (warp_index() == 0) {
      if (elect_one()) load_tiles<Element, Tile>(p, maps, w, k, s);
    } else if (warp_index() == 1) {
      if (elect_one()) add_grad_queries<Element, Tile>(p, w, k, s);
    } else if (kDropout) {
      make_bits<Element, Tile>(p, k, s);
    }
  } else {
    registers_up<240>();  // 32 + 2 x 240 = 512: all there are
    sum_grads<Element, Tile, kDropout>(p, maps, k, s);
  }
}

// ---- After: dQ -----------------------------------------------------------------------------------

constexpr int kConvertThreads = 128;

// One CTA for each tile of queries; a thread converts eight columns of a row at a time.
template <typename Element, typename Tile>
__global__ void __launch_bounds__(kConvertThreads)
    convert_grad_query(const Attention p, const AttentionGrads g, const BackwardWorkspace w) {
  const int tiles = tiles_of(p.n_queries, Tile::kQueries);
  const int tile = block_index() % tiles, batch_head = block_index() / tiles;
  const int b = batch_head / p.heads, h = batch_head % p.heads;
  const float* const sums =
      w.grad_query + static_cast<int64_t>(block_index()) * Tile::kQueries * Tile::kDim;
  const int chunks = p.dim / 8;
  for (int i = thread_index(); i < Tile::kQueries * chunks; i += kConvertThreads) {
    const int row = i / chunks, d = i % chunks * 8, n = tile * Tile::kQueries + row;
    if (n >= p.n_queries) return;
    Element8<Element> out;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const Float2 pair =
          *reinterpret_cast<const Float2*>(sums + grad_query_index<Tile>(row, d + j));
      out.x[j] = from_float<Element>(pair.x[0] * p.scale);
      out.x[j + 1] = from_float<Element>(pair.x[1] * p.scale);
    }
    *reinterpret_cast<Element8<Element>*>(row_of<Element>(g.grad_query, b, h, n) + d) = out;
  }
}

}  // namespace hopper
}  // namespace fusedformer
