// The functions of layouts.h and dropout_bits.h for tests/test_hopper_primitives.py, by ctypes.
#include <type_traits>

#include "dropout_bits.h"
#include "layouts.h"

using namespace fusedformer::hopper;

extern "C" {
int swizzle_of(int byte) { return swizzle(byte); }
int tile_byte_of(int rows, int row, int column) { return tile_byte(rows, row, column); }
int tile_bytes_of(int rows, int columns) { return tile_bytes(rows, columns); }
int fragment_row_of(int thread, int i) { return fragment_row(thread, i); }
int fragment_column_of(int thread, int i) { return fragment_column(thread, i); }
uint64_t k_major(uint32_t address, int rows, int k) {
  return k_major_descriptor(address) + k_major_step(rows, k);
}
uint64_t transposed(uint32_t address, int rows, int k) {
  return transposed_descriptor(address, rows) + transposed_step(k);
}

// Whether element (row, column) of a tile is kept, as the thread that has it in its accumulator
// reads it; of all bits of a tile that 96 threads made.
void dropout_tile(int rows_case, int transposed, uint64_t seed, uint32_t threshold, uint32_t batch,
                  uint32_t head, uint64_t first_row, uint64_t first_column, unsigned char* keep) {
  auto fill = [&](auto rows, auto columns) {
    constexpr int kR = decltype(rows)::value, kC = decltype(columns)::value;
    static uint32_t words[dropout_bytes(kR, kC) / 4];
    for (int thread = 0; thread < 96; ++thread)
      (transposed ? make_dropout_bits<kR, kC, true, 96> : make_dropout_bits<kR, kC, false, 96>)(
          words, seed, threshold, batch, head, first_row, first_column, thread);
    for (int block = 0; block < kR / 16; ++block)
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < kC / 2; ++i)
          keep[(block * 16 + fragment_row(lane, i)) * kC + fragment_column(lane, i)] =
              dropout_kept(words + dropout_word(kC, block, lane), i);
  };
  if (rows_case == 128)
    fill(std::integral_constant<int, 128>{}, std::integral_constant<int, 128>{});
  else
    fill(std::integral_constant<int, 64>{}, std::integral_constant<int, 80>{});
}
}
