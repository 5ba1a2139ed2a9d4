// y = x W^T + b for few rows of x: every weight is read from memory once, and that is its cost.
//
// Some rows of weights are multiplied with some of x at a time, so that both are read from the
// nearest cache less often than they are used, and the rows of weights that come next are fetched
// meanwhile. A number of y is the sum of 16, each of every sixteenth product, in the order of the
// columns: the same however many rows there are, so a token's result does not depend on its batch.
#pragma once

#include "linear.h"
#include "row_simd.h"

namespace fusedformer {
namespace {

// How many vectors of sums are kept in registers, and of how many rows of x.
#if defined(__AVX512F__)
constexpr int kSums = 16, kRows = 4;
#elif defined(__AVX2__)
constexpr int kSums = 4, kRows = 2;
#else
constexpr int kSums = 2, kRows = 2;
#endif

// Rows of x for which a block of weights is read once; where there are more, it is read again.
constexpr int kMostRows = 8;

// What is read again and again of x, a part of its columns if need be, stays in the nearest cache.
constexpr int64_t kSegmentBytes = 16384;

// One step along a row: kStep numbers of x and of the weights. Their products are added to 16 sums.
template <class T>
struct Steps {
  static constexpr int kStep = kLanes;
  using Operand = Floats;
  template <class N>
  static Operand read(const T* p, N n) {
    return load(p, n);
  }
  static Floats add(Operand x, Operand w, Floats sums) { return fma(x, w, sums); }
};

#if defined(__AVX512BF16__)
template <>
struct Steps<BFloat16> {
  static constexpr int kStep = 2 * kLanes;
  using Operand = __m512bh;
  static Operand read(const BFloat16* p, Whole) { return (__m512bh)_mm512_loadu_si512(p); }
  static Operand read(const BFloat16* p, Part n) {
    const __mmask32 inside = static_cast<__mmask32>((uint64_t{1} << n.lanes) - 1);
    return (__m512bh)_mm512_maskz_loadu_epi16(inside, p);
  }
  static Floats add(Operand x, Operand w, Floats sums) { return {_mm512_dpbf16_ps(sums.v, x, w)}; }
};
#endif

// Adds the products of n columns of `rows` rows of x and `columns` rows of weights to
// sums[row][column], in rows of kLinearBlock.
template <int rows, int columns, class T>
inline __attribute__((always_inline)) void add_products(const T* x, int64_t x_stride, const T* w,
                                                        int64_t w_stride, int64_t n,
                                                        Floats* sums) {
  using Step = Steps<T>;
  Floats part[rows][columns];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) part[r][c] = sums[r * kLinearBlock + c];
  const auto step = [&](int64_t k, auto inside) __attribute__((always_inline)) {
    typename Step::Operand xs[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) xs[r] = Step::read(x + r * x_stride + k, inside);
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) {
      const T* at = w + c * w_stride + k;
      __builtin_prefetch(at + columns * w_stride);
      const typename Step::Operand weights = Step::read(at, inside);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) part[r][c] = Step::add(xs[r], weights, part[r][c]);
    }
  };
  int64_t k = 0;
  for (; k + Step::kStep <= n; k += Step::kStep) step(k, Whole{});
  if (k < n) step(k, Part{static_cast<int>(n - k)});
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) sums[r * kLinearBlock + c] = part[r][c];
}

// The same for `count` rows of x, at most kRows.
template <int columns, int rows = kRows, class T>
inline __attribute__((always_inline)) void add_products_of(int64_t count, const T* x,
                                                           int64_t x_stride, const T* w,
                                                           int64_t w_stride, int64_t n,
                                                           Floats* sums) {
  if (count == rows)
    add_products<rows, columns>(x, x_stride, w, w_stride, n, sums);
  else if constexpr (rows > 1)
    add_products_of<columns, rows - 1>(count, x, x_stride, w, w_stride, n, sums);
}

// A block of columns of y from `column` on, of its rows from first to first + count - 1, without
// bias: totals[row][column].
template <class T>
void block(const Linear& a, int64_t first, int64_t count, int64_t column, int64_t columns,
           float (*totals)[kLinearBlock]) {
  Floats sums[kMostRows][kLinearBlock];
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < columns; ++c) sums[r][c] = splat(0.0f);
  const int64_t x_stride = a.x.stride, w_stride = a.weight.stride;
  const int64_t fits = kSegmentBytes / static_cast<int64_t>(sizeof(T)) / count;
  const int64_t segment = fits - fits % Steps<T>::kStep;
  for (int64_t k = 0; k < a.width; k += segment) {
    const int64_t n = a.width - k < segment ? a.width - k : segment;
    const T* w = static_cast<const T*>(a.weight.data) + column * w_stride + k;
    // With one row of x, rows of weights go one by one: memory is fastest read in its own order.
    constexpr int kColumns = kSums / kRows;
    for (int64_t c = 0; c < columns;) {
      const bool several = count > 1 && c + kColumns <= columns;
      for (int64_t r = 0; r < count; r += kRows) {
        const T* x = static_cast<const T*>(a.x.data) + (first + r) * x_stride + k;
        const int64_t rows = count - r < kRows ? count - r : kRows;
        if (several)
          add_products_of<kColumns>(rows, x, x_stride, w + c * w_stride, w_stride, n, &sums[r][c]);
        else
          add_products_of<1>(rows, x, x_stride, w + c * w_stride, w_stride, n, &sums[r][c]);
      }
      c += several ? kColumns : 1;
    }
  }
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < columns; ++c) totals[r][c] = sum(sums[r][c]);
}

template <class T>
void columns(const Linear& a, int64_t first, int64_t last) {
  for (int64_t column = first; column < last; column += kLinearBlock) {
    const Part part{static_cast<int>(last - column < kLinearBlock ? last - column : kLinearBlock)};
    const Floats bias = a.bias ? load(static_cast<const T*>(a.bias) + column, part) : splat(0.0f);
    for (int64_t row = 0; row < a.rows; row += kMostRows) {
      const int64_t count = a.rows - row < kMostRows ? a.rows - row : kMostRows;
      float totals[kMostRows][kLinearBlock] = {};
      block<T>(a, row, count, column, part.lanes, totals);
      for (int64_t r = 0; r < count; ++r)
        store(static_cast<T*>(a.y.data) + (row + r) * a.y.stride + column,
              load(totals[r], Whole{}) + bias, part);
    }
  }
}

void linear_forward(const Linear& a, int64_t first, int64_t last) {
  by_dtype(
      a.weight.type, FUSEDFORMER_OTHERS(linear_kernels),
      [&](auto element) { columns<decltype(element)>(a, first, last); },
      [&](const auto& others) { others.forward(a, first, last); });
}

}  // namespace

extern const LinearKernels FUSEDFORMER_NAME(linear_kernels) = {linear_forward};

}  // namespace fusedformer
