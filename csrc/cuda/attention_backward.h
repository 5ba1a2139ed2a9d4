// Attention's backward on Hopper: the kernels. FlashAttention-2 (Dao 2023), algorithm 2, in the
// structure of FlashAttention-3 (Shah et al. 2024) and with dropout.
//
//   prepare_rows          for each query LSE and shift = rowsum(dO o O) - dLSE; clears sums of dQ
//   attention_grads       one CTA for each block of keys: dK and dV, and what it adds to dQ
//   convert_grad_query    dQ from fp32 sums to the tensor
//
// With M the dropout mask (0, or 1 / (1 - p)) and scores kept transposed, keys by queries:
//
//   S^T = K Q^T            P^T  = exp(scale S^T - LSE)
//   dP^T = V dO^T          dS^T = P^T o (M o dP^T - shift)
//   dV = (P o M)^T dO      dK = scale dS^T Q      dQ = scale dS K
//
// Transposed, because P^T and dS^T then come out of the tensor cores with the rows that dV and dK
// ask for: up to D = 128 they stay in registers, as left operands of these products. Only dQ, which
// sums over keys and so over both warpgroups, needs dS in shared memory.
//
// Warps of a CTA: warp 0 loads tiles (TMA), warp 1 sends dQ away, warps 2 and 3 make dropout bits;
// two warpgroups of "consumers" do the rest (attention_backward_sums.h). How these share the work
// is in attention_backward_plan.h.
#pragma once

#include <math.h>

#include "attention_backward_sums.h"
#include "dropout_bits.h"
#include "hopper.h"

namespace fusedformer {
namespace hopper {

// An access of 16 bytes.
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
  Float4* const sums = reinterpret_cast<Float4*>(w.grad_query) +
                       static_cast<int64_t>(block_index()) * (kFloats / 4);
  for (int i = thread_index(); i < kFloats / 4; i += kPrepareThreads) sums[i] = Float4{};
  if (w.turns && thread_index() == 0) {
    w.turns[block_index()] = 0;
    if (block_index() == 0) *w.ticket = 0;
  }
}

// ---- Warp 0, one thread: loads ------------------------------------------------------------------

template <typename Element, typename Tile>
__device__ __forceinline__ void load_tiles(const Attention& p, const BackwardMaps& maps,
                                           const BackwardWorkspace& w, const KeyBlock& k,
                                           BackwardShared<Element, Tile>& s) {
  mbarrier_expect(&s.key_values_full, sizeof(s.keys) + sizeof(s.values));
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    const int d = panel_column<Tile>(panel);
    tma_load(s.keys[panel], maps.key, &s.key_values_full, d, k.first_key, k.key_head, k.batch);
    tma_load(s.values[panel], maps.value, &s.key_values_full, d, k.first_key, k.key_head, k.batch);
  }
#pragma unroll 1
  for (int t = 0; t < k.visits; ++t) {
    const int stage = t % Tile::kStages;
    const Visit v = visit_of(p, k, t);
    const int n = v.tile * Tile::kQueries;
    uint64_t* const full = &s.full[stage];
    mbarrier_wait(&s.empty[stage], (t / Tile::kStages + 1) % 2);
    mbarrier_expect(full, sizeof(s.queries[0]) + sizeof(s.grad_outs[0]) + sizeof(s.rows[0]));
#pragma unroll 1
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const int d = panel_column<Tile>(panel);
      tma_load(s.queries[stage][panel], maps.query, full, d, n, v.head, k.batch);
      tma_load(s.grad_outs[stage][panel], maps.grad_out, full, d, n, v.head, k.batch);
    }
    bulk_load(s.rows[stage], w.rows + v.at * 2 * Tile::kQueries, sizeof(s.rows[0]), full);
  }
}

// ---- Warp 1, one thread: dQ ---------------------------------------------------------------------

// Adds the parts of dQ that the consumers have staged to the workspace. Many CTAs add to one tile,
// in any order, unless they take turns.
template <typename Element, typename Tile>
__device__ __forceinline__ void add_grad_queries(const Attention& p, const BackwardWorkspace& w,
                                                 const KeyBlock& k,
                                                 BackwardShared<Element, Tile>& s) {
#pragma unroll 1
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
      bulk_reduce_add(sums + part * Tile::kPartFloats, s.grad_queries[part],
                      part_floats<Tile>(part) * sizeof(float));
      tma_commit();
    }
    static_assert(kConsumers == 2, "one part after the other is waited for");
    tma_wait_read<1>();
    mbarrier_arrive(&s.grad_query_empty[0]);
    tma_wait_read<0>();
    mbarrier_arrive(&s.grad_query_empty[1]);
    if (w.turns) {
      // The sums are there, not merely on their way, and this thread sees them: so does whoever
      // takes the next turn. What it adds goes the way of these, so that no fence is needed there.
      tma_wait<0>();
      add_release(w.turns + v.at, 1);
    }
  }
  tma_wait<0>();
}

// ---- Warps 2 and 3: dropout bits ----------------------------------------------------------------

constexpr int kDropoutWarps = 2;

template <typename Element, typename Tile>
__device__ __forceinline__ void make_bits(const Attention& p, const KeyBlock& k,
                                          BackwardShared<Element, Tile>& s) {
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  const int thread = thread_index() - 2 * 32;
#pragma unroll 1
  for (int t = 0; t < k.visits; ++t) {
    const int stage = t % Tile::kStages;
    const Visit v = visit_of(p, k, t);
    mbarrier_wait(&s.empty[stage], (t / Tile::kStages + 1) % 2);
    make_dropout_bits<Tile::kKeys, Tile::kQueries, true, 32 * kDropoutWarps>(
        s.kept[stage], seed, p.threshold,
        static_cast<uint32_t>(p.offsets[0] + k.batch),
        static_cast<uint32_t>(p.offsets[1] + v.head), p.offsets[3] + k.first_key,
        p.offsets[2] + v.tile * Tile::kQueries, thread);
    sync_warp();
    if (lane() == 0) mbarrier_arrive(&s.full[stage]);
  }
}

// ---- The kernel ---------------------------------------------------------------------------------

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

  // At the start each of the 384 threads has 168 registers: 64 K, shared out in multiples of 8.
  // What producers give up consumers get: 504 = 24 + 2 x 240 = 40 + 2 x 232.
  constexpr int kProducer = kDropout ? 40 : 24, kConsumer = kDropout ? 232 : 240;
  if (warp_index() < 4) {
    registers_down<kProducer>();
    if (warp_index() == 0) {
      if (elect_one()) load_tiles<Element, Tile>(p, maps, w, k, s);
    } else if (warp_index() == 1) {
      if (elect_one()) add_grad_queries<Element, Tile>(p, w, k, s);
    } else if (kDropout) {
      make_bits<Element, Tile>(p, k, s);
    }
  } else {
    registers_up<kConsumer>();
    sum_grads<Element, Tile, kDropout>(p, maps, k, s);
  }
}

// ---- After: dQ ----------------------------------------------------------------------------------

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
