// Who holds which element, on Hopper: tiles in shared memory, fragments of wgmma in registers,
// descriptors, dropout's bits. Index arithmetic alone, for host and device, and tested on a host.
//
// Sources: the PTX ISA, on wgmma's register fragments, matrix descriptors and swizzle modes. A test
// compares tiles, boxes of TMA, fragments and descriptors, of plain and of transposed operands,
// with the PTX that Triton has for the same products.
#pragma once

#include <stdint.h>

#include "../philox.h"

namespace fusedformer {
namespace hopper {

// ---- Tiles in shared memory ----------------------------------------------------------------
// A tile of R rows and D columns of 16-bit elements is D / 64 panels, one behind another, the last
// one filled up with columns of zeros. A panel is R rows of 64 elements, 128 bytes, and one box of
// TMA. Within each 8 rows the 16-byte chunks of row r change places: chunk c lies at c ^ r % 8. So
// the 8 chunks of a column lie in different banks, and wgmma reads rows and columns equally fast.
// Panels begin at multiples of 1024 bytes, for the swizzle is one of addresses.

constexpr int kPanelColumns = 64, kPanelRowBytes = 128;

FUSEDFORMER_HOST_DEVICE constexpr int panels(int columns) {
  return (columns + kPanelColumns - 1) / kPanelColumns;
}

FUSEDFORMER_HOST_DEVICE constexpr int panel_bytes(int rows) { return rows * kPanelRowBytes; }

FUSEDFORMER_HOST_DEVICE constexpr int tile_bytes(int rows, int columns) {
  return panels(columns) * panel_bytes(rows);
}

// Bits 4 to 6 of an address, the chunk, are xored with bits 7 to 9, the row.
FUSEDFORMER_HOST_DEVICE constexpr int swizzle(int byte) { return byte ^ ((byte >> 7 & 7) << 4); }

// Byte in a tile of `rows` rows. Columns 8 c to 8 c + 7 of a row are 16 bytes on end.
FUSEDFORMER_HOST_DEVICE constexpr int tile_byte(int rows, int row, int column) {
  return column / kPanelColumns * panel_bytes(rows) +
         swizzle(row * kPanelRowBytes + column % kPanelColumns * 2);
}

// ---- Fragments of wgmma --------------------------------------------------------------------
// Element (row, column) of an m64 nN accumulator that thread t of the warpgroup has in register i:
// i = 4 c + 2 r + e is row 16 (t / 32) + t % 32 / 4 + 8 r, column 8 c + 2 (t % 4) + e. For operand
// `a` in registers, 64 x 16, it is the same with the pair of e packed in one register. So
// accumulators 8 k to 8 k + 7, packed in pairs, are operand a of the k-th 16 columns.

FUSEDFORMER_HOST_DEVICE constexpr int fragment_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}

FUSEDFORMER_HOST_DEVICE constexpr int fragment_column(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

// ---- Descriptors of operands in shared memory ----------------------------------------------
// 64 bits: 0 to 13 the address, 16 to 29 the leading byte offset, 32 to 45 the stride byte offset,
// all in 16 bytes; 62 and 63 are 1 for 128-byte swizzle. (49 to 51, the offset of a tile that does
// not begin at a multiple of 1024, stay 0.) An address within a panel stands for the place before
// the swizzle, which the chip applies to the sum: hence a step of 16 columns is plainly 32 bytes.

FUSEDFORMER_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t leading,
                                                             uint32_t stride) {
  return (address >> 4 & 0x3FFF) | static_cast<uint64_t>(leading >> 4 & 0x3FFF) << 16 |
         static_cast<uint64_t>(stride >> 4 & 0x3FFF) << 32 | static_cast<uint64_t>(1) << 62;
}

// Rows of a tile are the rows of a, or the columns of b, and its columns are k: no transpose.
// `address`: of the tile's row (a multiple of 8) where the operand begins. Groups of 8 rows are
// 1024 bytes apart; the leading offset is not used.
FUSEDFORMER_HOST_DEVICE constexpr uint64_t k_major_descriptor(uint32_t address) {
  return matrix_descriptor(address, 0, 8 * kPanelRowBytes);
}
// What to add for columns 16 k to 16 k + 15 of a tile of `rows` rows.
FUSEDFORMER_HOST_DEVICE constexpr uint64_t k_major_step(int rows, int k) {
  return static_cast<uint64_t>((k / 4 * panel_bytes(rows) + k % 4 * 32) >> 4);
}

// Rows of a tile are k and its columns those of b, or the rows of a: kTransposeB or kTransposeA.
// `address`: of the tile's panel where the operand begins. The next 64 columns lie a panel further
// on (leading), the next 8 of k 1024 bytes (stride).
FUSEDFORMER_HOST_DEVICE constexpr uint64_t transposed_descriptor(uint32_t address, int rows) {
  return matrix_descriptor(address, panel_bytes(rows), 8 * kPanelRowBytes);
}
// What to add for rows 16 k to 16 k + 15.
FUSEDFORMER_HOST_DEVICE constexpr uint64_t transposed_step(int k) {
  return static_cast<uint64_t>(k * 16 * kPanelRowBytes >> 4);
}

// How many columns a product takes of a transposed tile that has these: whole panels. Both what PTX
// says and CUTLASS have such operands in multiples of 64 columns; that 96 would do, a panel and a
// half, is likely and remains to be tried (true), and would save up to a quarter of these products.
constexpr bool kPartialPanels = false;

FUSEDFORMER_HOST_DEVICE constexpr int product_columns(int columns, bool partial = kPartialPanels) {
  return partial ? columns : panels(columns) * kPanelColumns;
}

// ---- Dropout's bits of a tile of scores ----------------------------------------------------
// One bit a score, 1 = kept, in the order in which wgmma's accumulators hold the scores. The eight
// that a thread has of 16 x 16 scores, registers 8 k to 8 k + 7, are one byte. A thread's bytes for
// 16 rows lie on end and fill whole words: its register i is bit i % 32 of its word i / 32.

FUSEDFORMER_HOST_DEVICE constexpr int dropout_words(int columns) { return (columns + 63) / 64; }

FUSEDFORMER_HOST_DEVICE constexpr int dropout_bytes(int rows, int columns) {
  return rows / 16 * 32 * dropout_words(columns) * 4;
}

// The first word of a lane for rows 16 row_block to 16 row_block + 15 of a tile.
FUSEDFORMER_HOST_DEVICE constexpr int dropout_word(int columns, int row_block, int lane) {
  return (row_block * 32 + lane) * dropout_words(columns);
}

FUSEDFORMER_HOST_DEVICE constexpr bool dropout_kept(const uint32_t* words, int i) {
  return words[i / 32] >> i % 32 & 1;
}

}  // namespace hopper
}  // namespace fusedformer
