// Dropout's bits of a tile of scores, made by warps that have nothing else to do. They depend on
// position alone (philox.h), so that forward and backward make the same, each in its orientation.
#pragma once

#include "layouts.h"

namespace fusedformer {
namespace hopper {

// Adds to `bits` from bit `first` on the eight of one lane in a 16 x 16 block. The words of one
// call of Philox decide those of two lanes, 8 m + n (`odd` 0) and 8 m + n + 4 (1): of rows 2 m and
// 2 m + 1, columns 2 n and 2 n + 1, and each has one 8 further on.
//
// Bit by bit, upwards, into one word: nvcc then gathers seven comparisons in one instruction.
template <bool kTransposed>
FUSEDFORMER_HOST_DEVICE void add_dropout_byte(uint32_t& bits, const uint32_t (&words)[4], int odd,
                                              uint32_t threshold, int first) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {  // i = 4 c + 2 r + e: element (odd + 8 r, e + 8 c) of the call
    const int c = i / 4, r = i / 2 % 2, e = i % 2;
    const int word = kTransposed ? 2 * e + odd : 2 * odd + e;
    const int byte = kTransposed ? 2 * c + r : 2 * r + c;
    bits |= static_cast<uint32_t>(philox::kept(words[word], byte, threshold)) << (first + i);
  }
}

// Writes all bits of a kRows x kColumns tile: dropout_bytes() of them, laid out as layouts.h says.
// Rows are queries and columns keys, or the other way round with kTransposed.
//
// first_row, first_column: of the tile, in the whole problem; multiples of 16. `batch` and `head`
// likewise. `thread`: which this is of the kThreads that share the work. Words are filled: past the
// last column they have bits, too.
template <int kRows, int kColumns, bool kTransposed, int kThreads>
FUSEDFORMER_HOST_DEVICE void make_dropout_bits(uint32_t* bits, uint64_t seed, uint32_t threshold,
                                               uint32_t batch, uint32_t head, uint64_t first_row,
                                               uint64_t first_column, int thread) {
  static_assert(kRows % 16 == 0 && kColumns % 16 == 0, "whole blocks of 16 x 16");
  constexpr int kWords = dropout_words(kColumns);
  // A thread has one of the words of two lanes, 64 columns, in every so many blocks of 16 rows:
  // what depends on the column alone is computed once. Neighbouring threads, neighbouring lanes.
  constexpr int kRowBlocks = kThreads / (16 * kWords);
  static_assert(kThreads % (16 * kWords) == 0, "a thread keeps its columns");
  const int m = thread % 16 / 4, n = thread % 4, word = thread / 16 % kWords;
  const uint64_t row = first_row + 2 * m, column = first_column + 64 * word + 2 * n;
  uint32_t first[4];  // the counter; 16 further on, one of its words is larger by 4
  philox::attention_counter(batch, head, kTransposed ? column : row, kTransposed ? row : column,
                            first);
  constexpr int kRow = kTransposed ? 1 : 0, kColumn = 1 - kRow;  // which word counts them

  for (int row_block = thread / (16 * kWords); row_block < kRows / 16; row_block += kRowBlocks) {
    uint32_t even = 0, odd = 0;
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      uint32_t words[4] = {first[0], first[1], first[2], first[3]};
      words[kRow] += 4 * row_block;
      words[kColumn] += 4 * block;
      philox::philox4x32(seed, words);
      add_dropout_byte<kTransposed>(even, words, 0, threshold, 8 * block);
      add_dropout_byte<kTransposed>(odd, words, 1, threshold, 8 * block);
    }
    const int lane = 8 * m + n;
    bits[dropout_word(kColumns, row_block, lane) + word] = even;
    bits[dropout_word(kColumns, row_block, lane + 4) + word] = odd;
  }
}

}  // namespace hopper
}  // namespace fusedformer
