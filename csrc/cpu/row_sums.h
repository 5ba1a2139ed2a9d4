// Gradients of a weight or bias: sums over all rows. For entry points only.
//
// They are summed over fixed chunks of rows, each in float32 by one task, and these sums in the
// order of the chunks: whatever the number of threads, the same additions.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "tensors.h"

namespace fusedformer {
namespace {

// 64 chunks keep 64 threads busy and cost a sixty-fourth of the data in traffic; a chunk of fewer
// elements than the grain would cost more than it saves.
int64_t rows_of_chunk(int64_t rows, int64_t width) {
  return std::max(divided_up(rows, 64), divided_up(kGrain / 2, width));
}

// Of a chunk, so many rows are summed one by one, and these sums then: 32 is few enough for a
// float32 sum to stay as exact as eager's, which is pairwise, and enough to cost little.
constexpr int64_t kBlockRows = 32;

// to += from, four at a time by itself: this file is compiled with few optimisations.
void add(float* to, const float* from, int64_t n) {
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    *reinterpret_cast<Four*>(to + i) += *reinterpret_cast<const Four*>(from + i);
  for (; i < n; ++i) to[i] += from[i];
}

// total = the sums of run(first row, last row, sums that it adds to); block is scratch.
template <class Run>
void sum_blocks(int64_t first, int64_t last, int64_t columns, float* total, float* block,
                const Run& run) {
  std::fill_n(total, columns, 0.0f);
  run(first, std::min(last, first + kBlockRows), total);
  for (int64_t row = first + kBlockRows; row < last; row += kBlockRows) {
    std::fill_n(block, columns, 0.0f);
    run(row, std::min(last, row + kBlockRows), block);
    add(total, block, columns);
  }
}

// The sums of all chunks, (chunks, pitch), into the gradients: the first one's start at column 0,
// the second one's at `width`.
void add_up(const float* sums, int64_t chunks, int64_t pitch, int64_t width,
            const std::optional<Tensor>& first_grad, const std::optional<Tensor>& second_grad) {
  const auto columns = [&](const std::optional<Tensor>& grad, int64_t start, int64_t from,
                           int64_t until) {
    if (!grad || from >= until) return;
    std::vector<float> total(sums + from, sums + until);
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      add(total.data(), sums + chunk * pitch + from, until - from);
    write(*grad, total.data(), from - start, until - start);
  };
  torch::stable::parallel_for(0, pitch, std::max<int64_t>(kGrain / chunks, 16),
                              [&](int64_t from, int64_t until) {
                                columns(first_grad, 0, from, std::min(until, width));
                                columns(second_grad, width, std::max(from, width), until);
                              });
}

}  // namespace
}  // namespace fusedformer
