// The dropout mask of attention, as kernels/rng.py defines it.
#pragma once

#include "../philox.h"
#include "attention.h"
#include "attention_simd.h"

namespace fusedformer {
namespace {

// philox4x32() of csrc/philox.h for WORDS counters at once, in their place.
FUSEDFORMER_INLINE void philox_words(uint64_t seed, Words (&c)[4]) {
  using namespace philox;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  FUSEDFORMER_UNROLL for (int round = 0; round < kRounds; ++round) {
    const Words product0 = product(c[0], set_word(kMultiplier0));
    const Words product1 = product(c[2], set_word(kMultiplier1));
    // Only low halves count: what the high ones hold never reaches them.
    c[0] = xor3(high(product1), c[1], set_word(key0));
    c[2] = xor3(high(product0), c[3], set_word(key1));
    c[1] = product1;
    c[3] = product0;
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
}

// a and b of a call, as kept_tile() orders them.
constexpr uint64_t LANE_A[8] = {0, 1, 2, 3, 0, 1, 2, 3}, LANE_B[8] = {0, 0, 0, 0, 1, 1, 1, 1};

// Which elements of a 16 x 16 tile of scores are kept: bit i % 8 of kept[8 j + i / 8] is that of
// query i and key j. The first query and key are multiples of 16.
//
// A call of Philox decides queries (2a, 2a + 1) x keys (2b, 2b + 1), and those 8 after: words 0 and
// 2 the even key, 1 and 3 the odd one. Lanes are ordered by (b, a), so that for one key the words
// of queries 2a and 2a + 1, interleaved, are the queries in order:
// store_kept(even, odd, threshold, kept) has the words of even and odd queries for keys 2b, and
// writes those of the keys `kept + 16 b` and the keys 8 after (64 bytes further).
inline void kept_tile(const Attention& p, int64_t b, int64_t h, int64_t query, int64_t key,
                      uint8_t* kept) {
  uint32_t corner[4];
  philox::attention_counter(b + p.offsets[0], static_cast<uint32_t>(h + p.offsets[1]),
                            query + p.offsets[2], key + p.offsets[3], corner);
  constexpr int KEYS = WORDS / 4;  // values of b in a vector
  for (int first = 0; first < 4; first += KEYS) {
    Words words[4] = {sum(set_word(corner[0]), load_words(LANE_A)),
                      sum(set_word(corner[1] + first), load_words(LANE_B)), set_word(corner[2]),
                      set_word(corner[3])};
    philox_words(p.seed, words);
    store_kept(words[0], words[2], p.threshold, kept + 16 * first);
    store_kept(words[1], words[3], p.threshold, kept + 16 * first + 8);
  }
}

// The same for `queries` x `keys` of a tile and a block: 8 bytes for each key.
inline void kept_block(const Attention& p, int64_t b, int64_t h, int64_t query, int queries,
                       int64_t key, int keys, uint8_t* kept) {
  for (int j = 0; j < keys; j += 16)
    for (int i = 0; i < queries; i += 16)
      kept_tile(p, b, h, query + i, key + j, kept + 8 * j + i / 8);
}

}  // namespace
}  // namespace fusedformer
