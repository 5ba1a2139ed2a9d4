// Eight floats in an AVX2 register. See attention_simd.h.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

namespace fusedformer {
namespace {

using Vec = __m256;
using Lanes = __m256;  // all ones where set
constexpr int LANES = 8;
constexpr int ROWS = 6, COLUMNS = 2;  // 12 sums, 2 vectors of B and one of A in 16 registers

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec fms(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
inline Vec nfma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec eighths(Vec x, Vec& power, Vec& lacking) {
  const Vec sum = fma(x, set(8 * LOG2E), set(WHOLE));
  const __m256i n = _mm256_castps_si256(sum);  // in the last bits
  const __m256i* powers = reinterpret_cast<const __m256i*>(POWERS);
  power = _mm256_castsi256_ps(_mm256_add_epi32(
      _mm256_permutevar8x32_epi32(_mm256_load_si256(powers), n), _mm256_slli_epi32(n, 20)));
  lacking = _mm256_permutevar8x32_ps(_mm256_load_ps(LACKING), n);
  return nfma(_mm256_sub_ps(sum, set(WHOLE)), set(LN2 / 8), x);
}
inline void pin(Vec& x) { asm("" : "+x"(x)); }

inline Lanes lanes(const uint8_t* bits, int vector) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i here = _mm256_and_si256(_mm256_set1_epi32(bits[vector]), each);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(here, each));
}
inline Vec where(Lanes kept, Vec x) { return _mm256_and_ps(kept, x); }
inline Vec fma_where(Lanes kept, Vec a, Vec b, Vec c) {
  return _mm256_blendv_ps(c, fma(a, b, c), kept);
}

inline Vec from_float16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec from_bfloat16(const uint16_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline void to_float16(uint16_t* p, Vec x) {
  const __m128i y = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), y);
}
inline void to_bfloat16(uint16_t* p, Vec x) {
  // Round to nearest even; a NaN stays one.
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7FFF));
  const Vec quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));
  const Vec y = _mm256_blendv_ps(_mm256_castsi256_ps(sum), quiet,
                                 _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(y), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

// to[c][r] = from[r][c], for LANES x LANES words.
inline void transpose(const float* from, ptrdiff_t from_stride, float* to, ptrdiff_t to_stride) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) a[r] = load(from + r * from_stride);
#pragma GCC unroll 8
  for (int r = 0; r < 8; r += 2) {
    b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < 8; r += 4) {
    a[r] = _mm256_shuffle_ps(b[r], b[r + 2], 0x44);
    a[r + 1] = _mm256_shuffle_ps(b[r], b[r + 2], 0xEE);
    a[r + 2] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0x44);
    a[r + 3] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0xEE);
  }
#pragma GCC unroll 8
  for (int c = 0; c < 4; ++c) {
    store(to + c * to_stride, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
    store(to + (4 + c) * to_stride, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
  }
}

// Words in the low halves of 64-bit lanes, as Philox multiplies them.
using Words = __m256i;
constexpr int WORDS = 4;

inline Words set_word(uint32_t x) { return _mm256_set1_epi64x(x); }
inline Words load_words(const uint64_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Words sum(Words a, Words b) { return _mm256_add_epi64(a, b); }
inline Words product(Words a, Words b) { return _mm256_mul_epu32(a, b); }
inline Words high(Words x) { return _mm256_srli_epi64(x, 32); }
inline Words xor3(Words a, Words b, Words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }

// See attention_random.h.
inline void store_kept(Words even, Words odd, uint32_t threshold, uint8_t* kept) {
  __m256i word = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  const __m256i limit = _mm256_set1_epi32(static_cast<int>(threshold));
#pragma GCC unroll 4
  for (int byte = 0; byte < 4; ++byte) {
    const __m256i least = _mm256_min_epu32(word, limit);  // the limit, where the word is not below
    const __m256 at_least = _mm256_castsi256_ps(_mm256_cmpeq_epi32(least, limit));
    kept[byte % 2 * 64 + byte / 2] = static_cast<uint8_t>(_mm256_movemask_ps(at_least));
    word = _mm256_or_si256(_mm256_slli_epi32(word, 8), _mm256_srli_epi32(word, 24));
  }
}

}  // namespace
}  // namespace fusedformer
