// Attention's forward on Hopper: the kernel. FlashAttention-2 (Dao 2023), algorithm 1, in the
// structure of FlashAttention-3 (Shah et al. 2024), with dropout.
//
// A tile is 64 queries of one head for each of two warpgroups, the "consumers". Over blocks of
// keys, last to first, with the running maximum m and sum l of each query's row:
//
//   S = Q K^T;  m' = max(m, rowmax S);  P = exp(scale (S - m'));  a = exp(scale (m - m'))
//   l = a l + rowsum P;   O = a O + dropout(P) V
//
// and at the end O / (l (1 - p)) and LSE = scale m + log l: that of the undropped scores.
//
// The other warpgroup feeds them (attention_forward_producers.h). Its warp 0 takes tiles from the
// schedule and loads Q, K and V by TMA; its other warps make the bits of dropout: consumers only
// read one bit for each score. They all run at their own pace: rings of buffers lie between them,
// each buffer with an mbarrier that says it is full and one that says it is empty.
//
// To read on, begin with attention_forward_kernel at the end, then consume() above it.
//
// A consumer overlaps its own work: S of the next block is being multiplied while O takes in this
// one's P, and the next softmax runs meanwhile. The two consumers overlap, too: they take turns at
// issuing products (ping-pong), so that one's softmax lies under the other's products.
#pragma once

#include <math.h>

#include "attention_forward_producers.h"

namespace fusedformer {
namespace hopper {

constexpr float kLog2e = 1.4426950408889634f;

// ---- Consumers ---------------------------------------------------------------------------------
//
// As layouts.h has it, a thread's register 4 c + 2 r + e of an accumulator is of row 16 warp +
// lane / 4 + 8 r of the warpgroup's 64, and of column 8 c + 2 (lane % 4) + e. So a thread has two
// rows, r = 0 and 1, and shares each with the three other lanes of its quad.

enum ForwardBarrier {
  kAllConsumers = 1,
  kOneConsumer = 2,  // + which
  kTurn = 5,         // + which; Tile::kConsumers is 3 at most
};

// Ping-pong: a consumer issues its products in its turn, and computes its softmax in the others'.
// Nobody waits for ever: all consumers take equally many turns, for they visit the same blocks of
// the same tiles; in its turn a consumer waits for the load of V alone; and that waits for a buffer
// of two blocks ago or more, which all have released, or they could not have passed a turn since.
template <typename Tile>
__device__ __forceinline__ void take_turn(int consumer) {
  if constexpr (Tile::kTurns) barrier_sync(kTurn + consumer, 2 * kWarpgroup);
}
template <typename Tile>
__device__ __forceinline__ void pass_turn(int consumer) {
  if constexpr (Tile::kTurns)
    barrier_arrive(kTurn + (consumer + 1) % Tile::kConsumers, 2 * kWarpgroup);
}

// Starts S = Q K^T, for the consumer's 64 queries.
template <typename Element, typename Tile>
__device__ __forceinline__ void start_scores(float (&scores)[Tile::kKeys / 2], int consumer,
                                             int stage, ForwardShared<Element, Tile>& s) {
  const uint64_t queries = k_major_descriptor(shared_address(s.query[0][64 * consumer]));
  const uint64_t keys = k_major_descriptor(shared_address(s.key[stage]));
  wgmma_fence(scores);
#pragma unroll
  for (int step = 0; step < Tile::kDim / 16; ++step)
    wgmma_ss<Tile::kKeys, Element>(scores, queries + k_major_step(Tile::kQueries, step),
                                   keys + k_major_step(Tile::kKeys, step), step > 0);
  wgmma_commit();
}

// Starts O += P V.
template <typename Element, typename Tile>
__device__ __forceinline__ void start_out(float (&out)[Tile::kOutDim / 2],
                                          uint32_t (&weights)[Tile::kKeys / 16][4], int stage,
                                          ForwardShared<Element, Tile>& s) {
  const uint64_t values = transposed_descriptor(shared_address(s.value[stage]), Tile::kKeys);
  wgmma_fence(out, weights);
#pragma unroll
  for (int step = 0; step < Tile::kKeys / 16; ++step)
    wgmma_rs<Tile::kOutDim, Element, true>(out, weights[step], values + transposed_step(step),
                                           true);
  wgmma_commit();
}

// -inf for what is hidden: a row sees `visible` keys of this block.
template <int kKeys>
__device__ __forceinline__ void hide(float (&scores)[kKeys / 2], const int (&visible)[2]) {
#pragma unroll
  for (int c = 0; c < kKeys / 8; ++c)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (8 * c + e >= visible[r] - 2 * (lane() % 4)) scores[4 * c + 2 * r + e] = -INFINITY;
}

// P in the place of S. The rows' sums are of this thread's columns alone, until the end.
template <int kKeys>
__device__ __forceinline__ void soften(float (&scores)[kKeys / 2], float scale_log2,
                                       float (&maximum)[2], float (&sum)[2], float (&rescale)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float before = maximum[r];
#pragma unroll
    for (int c = 0; c < kKeys / 8; ++c)
      maximum[r] = fmaxf(maximum[r], fmaxf(scores[4 * c + 2 * r], scores[4 * c + 2 * r + 1]));
    maximum[r] = fmaxf(maximum[r], shuffle_xor(maximum[r], 1));
    maximum[r] = fmaxf(maximum[r], shuffle_xor(maximum[r], 2));
    // A row that has seen no key yet: -inf - -inf would be NaN, and any number serves.
    const float shift = maximum[r] == -INFINITY ? 0.f : maximum[r] * scale_log2;
    rescale[r] = fast_exp2(before * scale_log2 - shift);
    sum[r] *= rescale[r];
#pragma unroll
    for (int c = 0; c < kKeys / 8; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = scores[4 * c + 2 * r + e];
        x = fast_exp2(x * scale_log2 - shift);
        sum[r] += x;
      }
  }
}

// Zeros for the probabilities that are dropped. A block's bits come in step with its K.
template <typename Element, typename Tile>
__device__ __forceinline__ void drop(float (&weights)[Tile::kKeys / 2], int consumer,
                                     const Cursor<Tile::kStages>& kept,
                                     ForwardShared<Element, Tile>& s) {
  const int first = dropout_word(Tile::kKeys, 4 * consumer + warp_index() % 4, lane());
  uint32_t bits[dropout_words(Tile::kKeys)];
  mbarrier_wait(&s.kept_full[kept.at], kept.parity);
#pragma unroll
  for (int i = 0; i < dropout_words(Tile::kKeys); ++i)
    bits[i] = s.kept[kept.at][first + i];
  release(&s.kept_empty[kept.at]);
#pragma unroll
  for (int i = 0; i < Tile::kKeys / 2; ++i) zero_unless(weights[i], bits[i / 32], 1u << i % 32);
}

// In 16 bits, as left operands: operand k is columns 16 k to 16 k + 15, in the order of registers.
template <typename Element, int kKeys>
__device__ __forceinline__ void pack_weights(uint32_t (&weights)[kKeys / 16][4],
                                             const float (&scores)[kKeys / 2]) {
#pragma unroll
  for (int i = 0; i < kKeys / 4; ++i)
    weights[i / 4][i % 4] = pack<Element>(scores[2 * i], scores[2 * i + 1]);
}

// Zeros for the rows of V past the length. P is 0 there, but they may hold NaN, and 0 times NaN
// would reach O. All consumers share the work.
template <typename Element, typename Tile>
__device__ __forceinline__ void clear_values(int first, int stage,
                                             ForwardShared<Element, Tile>& s) {
  struct alignas(16) Chunk {
    uint32_t word[4];
  };
  constexpr int kChunks = kPanelRowBytes / sizeof(Chunk);  // of a row
  const int thread = thread_index() - kWarpgroup * Tile::kProducers;
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    Chunk* const chunks = reinterpret_cast<Chunk*>(s.value[stage][panel]);
    for (int i = first * kChunks + thread; i < Tile::kKeys * kChunks;
         i += Tile::kConsumers * kWarpgroup)
      chunks[i] = Chunk{};
  }
  fence_async();
  barrier_sync(kAllConsumers, Tile::kConsumers * kWarpgroup);
}

// O / l, and LSE. Rows past Nq are not written: TMA clips O.
template <typename Element, typename Tile>
__device__ __forceinline__ void store_out(const Attention& p, const ForwardMaps& maps,
                                          const ForwardWork& work, int consumer,
                                          float (&out)[Tile::kOutDim / 2],
                                          const float (&maximum)[2], float (&sum)[2],
                                          ForwardShared<Element, Tile>& s) {
  const int warp = warp_index() % 4, first_query = work.first_query + 64 * consumer;
  const bool leader = thread_index() % kWarpgroup == 0;
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] += shuffle_xor(sum[r], 1);
    sum[r] += shuffle_xor(sum[r], 2);
    inverse[r] = sum[r] == 0 ? 0.f : p.inverse_keep / sum[r];
    const int query = first_query + 16 * warp + lane() / 4 + 8 * r;
    if (lane() % 4 == 0 && query < p.n_queries)
      p.lse[(static_cast<int64_t>(work.batch) * p.heads + work.head) * p.n_queries + query] =
          sum[r] == 0 ? -INFINITY : maximum[r] * p.scale + logf(sum[r]);
  }

  // What was stored before has left, and all four warps are done with Q: O may take its place.
  if (leader) tma_wait_read<0>();
  barrier_sync(kOneConsumer + consumer, kWarpgroup);
  auto& tile = s.out();
#pragma unroll
  for (int step = 0; step < Tile::kOutDim / 16; ++step) {  // 16 x 16 of a warp at a time
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      packed[i] = pack<Element>(out[8 * step + 2 * i] * inverse[i % 2],
                                out[8 * step + 2 * i + 1] * inverse[i % 2]);
    const int row = 64 * consumer + 16 * warp + lane() % 16, column = 16 * step + lane() / 16 * 8;
    store_matrices(reinterpret_cast<char*>(&tile) + tile_byte(Tile::kQueries, row, column), packed);
  }
  fence_async();
  barrier_sync(kOneConsumer + consumer, kWarpgroup);
  if (!leader) return;
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel)
    tma_store(maps.out, tile[panel][64 * consumer], panel * kPanelColumns, first_query, work.head,
              work.batch);
  tma_commit();
  if (!Tile::kOwnOut) {
    tma_wait_read<0>();
    mbarrier_arrive(&s.query_empty);
  }
}

template <typename Element, typename Tile, bool kDropout>
__device__ __forceinline__ void consume(const Attention& p, const ForwardMaps& maps,
                                        ForwardShared<Element, Tile>& s) {
  constexpr int kKeys = Tile::kKeys;
  const int consumer = warp_index() / 4 - Tile::kProducers;  // which warpgroup
  const float scale_log2 = p.scale * kLog2e;
  const int diagonal = static_cast<int>(p.diagonal);
  Cursor<2> slot;
  Cursor<1> query;
  Cursor<Tile::kStages> key, value;
  if (consumer == Tile::kConsumers - 1) pass_turn<Tile>(consumer);  // the first turn is 0's

  for (ForwardWork work; (work = next_work(s, slot)).batch >= 0; query.next()) {
    const int first_query = work.first_query + 64 * consumer;
    const int blocks = blocks_of<Tile>(p, work);
    const int whole = whole_key_blocks(first_query, work.length, diagonal, kKeys);
    float out[Tile::kOutDim / 2], scores[kKeys / 2];
    uint32_t weights[kKeys / 16][4];
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, rescale[2];
#pragma unroll
    for (int i = 0; i < Tile::kOutDim / 2; ++i) out[i] = 0;

    // S of a block to what V is multiplied with. Masks where some row does not see the whole block.
    const auto weigh = [&](int block) {
      if (block >= whole) {
        const int query = first_query + 16 * (warp_index() % 4) + lane() / 4;
        const int visible[2] = {visible_keys(query, work.length, diagonal) - block * kKeys,
                                visible_keys(query + 8, work.length, diagonal) - block * kKeys};
        hide<kKeys>(scores, visible);
      }
      soften<kKeys>(scores, scale_log2, maximum, sum, rescale);
      if (kDropout) drop(scores, consumer, key, s);
      // ptxas moves a wait for products up as far as it can, past all arithmetic: the softmax would
      // run after O += P V, and not under it. It moves none past a branch, such as this one, which
      // needs every exponential. It is never taken.
      if (sum[0] + sum[1] < 0) trap();
    };

    mbarrier_wait(&s.query_full, query.parity);
    if (blocks > 0) {
      mbarrier_wait(&s.key_full[key.at], key.parity);
      start_scores(scores, consumer, key.at, s);
      wgmma_wait<0>(scores);
      release(&s.key_empty[key.at]);
      weigh(blocks - 1);
      key.next();
      pack_weights<Element, kKeys>(weights, scores);
      if (work.length < p.n_keys && blocks * kKeys > work.length) {
        mbarrier_wait(&s.value_full[value.at], value.parity);
        clear_values(work.length % kKeys, value.at, s);
      }

      for (int block = blocks - 2; block >= 0; --block) {
        mbarrier_wait(&s.key_full[key.at], key.parity);
        take_turn<Tile>(consumer);
        start_scores(scores, consumer, key.at, s);
        mbarrier_wait(&s.value_full[value.at], value.parity);
        start_out<Element, Tile>(out, weights, value.at, s);
        pass_turn<Tile>(consumer);
        wgmma_wait<1>(scores);
        release(&s.key_empty[key.at]);
        weigh(block);
        key.next();
        wgmma_wait<0>(out, weights);
        release(&s.value_empty[value.at]);
        value.next();
        // O so far was weighed with the maximum before this block.
#pragma unroll
        for (int i = 0; i < Tile::kOutDim / 2; ++i) out[i] *= rescale[i / 2 % 2];
        pack_weights<Element, kKeys>(weights, scores);
      }

      mbarrier_wait(&s.value_full[value.at], value.parity);
      start_out<Element, Tile>(out, weights, value.at, s);
      if (Tile::kOwnOut) release(&s.query_empty);
      wgmma_wait<0>(out, weights);
      release(&s.value_empty[value.at]);
      value.next();
    } else if (Tile::kOwnOut) {
      release(&s.query_empty);
    }
    store_out(p, maps, work, consumer, out, maximum, sum, s);
  }
  tma_wait<0>();  // shared memory is read until then
}

// ---- The kernel --------------------------------------------------------------------------------

// A CTA for each multiprocessor, or one for each tile where these are fewer.
template <typename Element, typename Tile, bool kDropout>
__global__ void __launch_bounds__(kForwardThreads<Tile>, 1)
    attention_forward_kernel(const __grid_constant__ Attention p,
                             const __grid_constant__ ForwardMaps maps,
                             const __grid_constant__ TileOrder order) {
  auto& s = *reinterpret_cast<ForwardShared<Element, Tile>*>(shared_memory());
  if (thread_index() == 0) {
    // Arrivals that empty a buffer: one from each warp that reads it.
    constexpr int kReaders = 4 * Tile::kConsumers;
    mbarrier_init(&s.query_full, 1);
    mbarrier_init(&s.query_empty, Tile::kOwnOut ? kReaders : Tile::kConsumers);
    for (int i = 0; i < Tile::kStages; ++i) {
      mbarrier_init(&s.key_full[i], 1);
      mbarrier_init(&s.key_empty[i], kReaders);
      mbarrier_init(&s.value_full[i], 1);
      mbarrier_init(&s.value_empty[i], kReaders);
      mbarrier_init(&s.kept_full[i], kBitWarps<Tile>);
      mbarrier_init(&s.kept_empty[i], kReaders);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&s.work_full[i], 1);
      mbarrier_init(&s.work_empty[i], kReaders + (kDropout ? kBitWarps<Tile> : 0));
    }
    mbarrier_init_fence();
  }
  sync_threads();

  if (warp_index() < 4 * Tile::kProducers) {
    registers_down<Tile::kProducerRegisters>();
    if (warp_index() > 0) {
      if (kDropout) make_bits<Element, Tile>(p, s);
    } else if (lane() == 0) {
      load_tiles(p, maps, order, s);
    }
  } else {
    registers_up<Tile::kConsumerRegisters>();
    consume<Element, Tile, kDropout>(p, maps, s);
  }
}

}  // namespace hopper
}  // namespace fusedformer
