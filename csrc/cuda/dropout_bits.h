// Dropout's bits of a tile of scores, made by warps that have nothing else to do. They depend on
// position alone (philox.h), so that forward and backward make the same, each in its orientation.
#pragma once

#include "layouts.h"

namespace fusedformer {
namespace hopper {

// The bits of two lanes for one 16 x 16 block: bits 0 to 7 for the lane of the even row, 8 to 15
// for that of the odd row. One call of Philox decides just these: its two rows are lanes 8 m + n and
// 8 m + n + 4 (rows 2 m and 2 m + 1, columns 2 n and 2 n + 1, and each 8 further on).
template <bool kTransposed>
FUSEDFORMER_HOST_DEVICE uint32_t dropout_pair(uint64_t seed, uint32_t threshold, uint32_t batch,
                                              uint32_t head, uint64_t row, uint64_t column) {
  uint32_t words[4];
  philox::attention_counter(batch, head, kTransposed ? column : row, kTransposed ? row : column,
                            words);
  philox::philox4x32(seed, words);
  uint32_t bits = 0;
  // Bit 4 c + 2 r + e of the lane of row `odd`: element (odd + 8 r, e + 8 c) of the call.
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int odd = i / 8, c = i / 4 % 2, r = i / 2 % 2, e = i % 2;
    const int word = kTransposed ? 2 * e + odd : 2 * odd + e;
    const int byte = kTransposed ? 2 * c + r : 2 * r + c;
    bits |= static_cast<uint32_t>(philox::kept(words[word], byte, threshold)) << i;
  }
  return bits;
}

// Writes all bits of a kRows x kColumns tile: dropout_bytes() of them, laid out as layouts.h says.
// Rows are queries and columns keys, or the other way round with kTransposed.
//
// first_row, first_column: of the tile, in the whole problem; multiples of 16. `batch` and `head`
// likewise. thread, threads: which of how many threads this is that share the work.
template <int kRows, int kColumns, bool kTransposed>
FUSEDFORMER_HOST_DEVICE void make_dropout_bits(uint32_t* bits, uint64_t seed, uint32_t threshold,
                                               uint32_t batch, uint32_t head, uint64_t first_row,
                                               uint64_t first_column, int thread, int threads) {
  static_assert(kRows % 16 == 0 && kColumns % 16 == 0, "whole blocks of 16 x 16");
  constexpr int kWords = dropout_words(kColumns), kBlocks = kColumns / 16;
  // A unit is two lanes' words for 64 columns. Neighbouring threads have neighbouring lanes.
  for (int unit = thread; unit < kRows / 16 * kWords * 16; unit += threads) {
    const int pair = unit % 16, word = unit / 16 % kWords, row_block = unit / 16 / kWords;
    const int m = pair / 4, n = pair % 4;
    uint32_t even = 0, odd = 0;
    for (int block = 0; block < 4; ++block) {
      if (word * 4 + block >= kBlocks) break;
      const uint32_t two = dropout_pair<kTransposed>(
          seed, threshold, batch, head, first_row + row_block * 16 + 2 * m,
          first_column + (word * 4 + block) * 16 + 2 * n);
      even |= (two & 0xFF) << 8 * block;
      odd |= (two >> 8) << 8 * block;
    }
    const int lane = 8 * m + n;
    bits[dropout_word(kColumns, row_block, lane) + word] = even;
    bits[dropout_word(kColumns, row_block, lane + 4) + word] = odd;
  }
}

}  // namespace hopper
}  // namespace fusedformer
