// Matrix products of attention, and the two kinds of arithmetic that they are made of.
//
// A product C = A B has B packed with columns in the lanes; A's elements are broadcast one by one,
// from wherever they lie. An element is a word of 32 bits: a float, or a pair of bfloat16 that
// follow each other along the inner dimension.
#pragma once

#include "attention.h"
#include "attention_simd.h"

namespace fusedformer {
namespace {

// float32: whatever the dtype outside, exact to its last bits.
struct Float32 {
  static constexpr int PER_WORD = 1;
  static constexpr float UNIT = 1.0f;  // of exponents: of e
  static constexpr uint32_t SIGNS = 0x80000000u;

  static FUSEDFORMER_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) { return fma(a, b, sum); }

  // e^x for x <= 0 or little more; NaN for NaN. As 2^(n/8) e^r: what bounds it is how many
  // instructions it has, and a table spares two terms of e^r and the steps that make a power of 2.
  // The largest error is 0.6 ulp for x from -1 on and 1 from -10 on; from there it grows with -x,
  // as ln 2 is rounded, to 4.5, where the rounding of x itself makes ten times as much.
  static FUSEDFORMER_INLINE Vec exp(Vec x) {
    x = larger(set(-127 * LN2), x);
    Vec power, lacking;
    const Vec r = eighths(x, power, lacking);
    Vec y = fma(set(0x1.555da6p-5f), r, set(0x1.555c76p-3f));
    y = fma(y, r, set(0.5f));
    y = fma(y, r, set(1.0f));
    y = fma(y, r, lacking);
    return fma(power, y, power);
  }
};

#ifdef __AVX512BF16__
// bfloat16 products, float32 sums.
struct Bfloat16 {
  static constexpr int PER_WORD = 2;
  static constexpr float UNIT = LOG2E;  // of exponents: of 2
  static constexpr uint32_t SIGNS = 0x80008000u;

  static FUSEDFORMER_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }

  // 2^x for x <= 0 or little more, to 1e-4: a bfloat16 has an ulp of 8e-3.
  static FUSEDFORMER_INLINE Vec exp(Vec x) {
    const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vec r = _mm512_sub_ps(x, n);
    Vec y = fma(set(0.0550089292f), r, set(0.242210969f));
    y = fma(y, r, set(0.693282902f));
    y = fma(y, r, set(1.0f));
    return _mm512_scalef_ps(y, n);
  }
};

// Words of the bfloat16 nearest to two floats each, low half first.
FUSEDFORMER_INLINE Vec pair(Vec low, Vec high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_castsi512_ps(
      _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low)));
}
#endif

// Where A's element (row, step) lies: steps side by side, or rows side by side. Strides in bytes.
struct StepsInRows {
  const char* data;
  ptrdiff_t stride;
  StepsInRows from(int row) const { return {data + row * stride, stride}; }
  FUSEDFORMER_INLINE const float* at(int row, ptrdiff_t step) const {
    return reinterpret_cast<const float*>(data + row * stride) + step;
  }
};
struct RowsInSteps {
  const char* data;
  ptrdiff_t stride;
  RowsInSteps from(int row) const { return {data + 4 * row, stride}; }
  FUSEDFORMER_INLINE const float* at(int row, ptrdiff_t step) const {
    return reinterpret_cast<const float*>(data + step * stride) + row;
  }
};

inline float word(const float* p) {
  float x;
  __builtin_memcpy(&x, p, 4);  // not always aligned
  return x;
}

// epilogue(sums) with sums[r][c] = sum over steps of A(r, step) B(step, vector c).
template <class Math, int R, int C, class A, class Epilogue>
FUSEDFORMER_INLINE void product_tile(int steps, A a, const float* b, ptrdiff_t b_stride,
                                     Epilogue&& epilogue) {
  Vec sums[R][C];
  FUSEDFORMER_UNROLL for (int r = 0; r < R; ++r)
    FUSEDFORMER_UNROLL for (int c = 0; c < C; ++c) sums[r][c] = zero();
  for (int step = 0; step < steps; ++step, b += b_stride) {
    Vec columns[C];
    FUSEDFORMER_UNROLL for (int c = 0; c < C; ++c) {
      columns[c] = load(b + c * LANES);
      pin(columns[c]);
    }
    FUSEDFORMER_UNROLL for (int r = 0; r < R; ++r) {
      const Vec element = set(word(a.at(r, step)));
      FUSEDFORMER_UNROLL for (int c = 0; c < C; ++c)
        sums[r][c] = Math::multiply_add(sums[r][c], element, columns[c]);
    }
  }
  epilogue(sums);
}

// A single column of vectors leaves registers for more rows.
template <int C>
constexpr int rows_of() {
  return C == 1 ? 8 : ROWS;
}

// C (rows x vectors) += A B; if SCALED, C is first multiplied by a factor for each column.
template <class Math, bool SCALED, class A>
FUSEDFORMER_APART void product(int rows, int steps, int vectors, A a, const float* b,
                               ptrdiff_t b_stride, float* c, ptrdiff_t c_stride,
                               const float* factors = nullptr) {
  each_panel(vectors, [&](auto width, int v) FUSEDFORMER_LAMBDA {
    constexpr int C = decltype(width)::value;
    each_strip<rows_of<C>()>(0, rows, [&](auto height, int row) FUSEDFORMER_LAMBDA {
      constexpr int R = decltype(height)::value;
      float* to = c + row * c_stride + v * LANES;
      product_tile<Math, R, C>(
          steps, a.from(row), b + v * LANES, b_stride, [&](Vec(&sums)[R][C]) FUSEDFORMER_LAMBDA {
            FUSEDFORMER_UNROLL for (int r = 0; r < R; ++r)
              FUSEDFORMER_UNROLL for (int k = 0; k < C; ++k) {
                float* at = to + r * c_stride + k * LANES;
                if constexpr (SCALED)
                  store(at, fma(load(at), load(factors + (v + k) * LANES), sums[r][k]));
                else
                  store(at, add(load(at), sums[r][k]));
              }
          });
    });
  });
}

}  // namespace
}  // namespace fusedformer
