// Sixteen floats in an AVX-512 register. See attention_simd.h.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

namespace fusedformer {
namespace {

using Vec = __m512;
using Lanes = __mmask16;
constexpr int LANES = 16;
constexpr int ROWS = 4, COLUMNS = 4;  // 16 sums, 4 vectors of B and one of A in 32 registers

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
inline Vec nfma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec eighths(Vec x, Vec& power, Vec& lacking) {
  const Vec sum = fma(x, set(8 * LOG2E), set(WHOLE));
  const __m512i n = _mm512_castps_si512(sum);  // in the last bits
  const __m256i* half = reinterpret_cast<const __m256i*>(POWERS);
  const __m512i powers = _mm512_broadcast_i32x8(_mm256_load_si256(half));
  power = _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_permutexvar_epi32(n, powers), _mm512_slli_epi32(n, 20)));
  lacking = _mm512_permutexvar_ps(n, _mm512_broadcast_f32x8(_mm256_load_ps(LACKING)));
  return nfma(_mm512_sub_ps(sum, set(WHOLE)), set(LN2 / 8), x);
}
inline void pin(Vec& x) { asm("" : "+v"(x)); }

inline Lanes lanes(const uint8_t* bits, int vector) {
  uint16_t mask;
  __builtin_memcpy(&mask, bits + 2 * vector, 2);
  return mask;
}
inline Vec where(Lanes kept, Vec x) { return _mm512_maskz_mov_ps(kept, x); }
inline Vec fma_where(Lanes kept, Vec a, Vec b, Vec c) {
  return _mm512_mask3_fmadd_ps(a, b, c, kept);
}

inline Vec from_float16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec from_bfloat16(const uint16_t* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline void to_float16(uint16_t* p, Vec x) {
  const __m256i y = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), y);
}
inline void to_bfloat16(uint16_t* p, Vec x) {
  // Round to nearest even by hand: not every AVX-512 has the instruction. A NaN stays one.
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i y = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
  const Lanes nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  y = _mm512_mask_mov_epi32(y, nan, _mm512_set1_epi32(0x7FC00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(y, 16)));
}

// to[c][r] = from[r][c], for LANES x LANES words.
inline void transpose(const float* from, ptrdiff_t from_stride, float* to, ptrdiff_t to_stride) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) a[r] = load(from + r * from_stride);
#pragma GCC unroll 16
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < 16; r += 4) {
    a[r] = _mm512_shuffle_ps(b[r], b[r + 2], 0x44);
    a[r + 1] = _mm512_shuffle_ps(b[r], b[r + 2], 0xEE);
    a[r + 2] = _mm512_shuffle_ps(b[r + 1], b[r + 3], 0x44);
    a[r + 3] = _mm512_shuffle_ps(b[r + 1], b[r + 3], 0xEE);
  }
  // a[4 g + c] holds, in quarter q, column 4 q + c of rows 4 g to 4 g + 3.
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    b[c] = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88);
    b[4 + c] = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xDD);
    b[8 + c] = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    b[12 + c] = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xDD);
  }
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    store(to + c * to_stride, _mm512_shuffle_f32x4(b[c], b[8 + c], 0x88));
    store(to + (8 + c) * to_stride, _mm512_shuffle_f32x4(b[c], b[8 + c], 0xDD));
    store(to + (4 + c) * to_stride, _mm512_shuffle_f32x4(b[4 + c], b[12 + c], 0x88));
    store(to + (12 + c) * to_stride, _mm512_shuffle_f32x4(b[4 + c], b[12 + c], 0xDD));
  }
}

// Words in the low halves of 64-bit lanes, as Philox multiplies them.
using Words = __m512i;
constexpr int WORDS = 8;

inline Words set_word(uint32_t x) { return _mm512_set1_epi64(x); }
inline Words load_words(const uint64_t* p) { return _mm512_loadu_si512(p); }
inline Words sum(Words a, Words b) { return _mm512_add_epi64(a, b); }
inline Words product(Words a, Words b) { return _mm512_mul_epu32(a, b); }
inline Words high(Words x) { return _mm512_srli_epi64(x, 32); }
inline Words xor3(Words a, Words b, Words c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

// See attention_random.h.
inline void store_kept(Words even, Words odd, uint32_t threshold, uint8_t* kept) {
  const __m512i both = _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
  const __m512i turns = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16);
  const __m512i limit = _mm512_set1_epi32(static_cast<int>(threshold));
  const __m512i pairs[2] = {_mm512_shuffle_i64x2(both, both, 0x44),
                            _mm512_shuffle_i64x2(both, both, 0xEE)};
#pragma GCC unroll 2
  for (int u = 0; u < 2; ++u) {
    const __m512i turned = _mm512_rolv_epi32(pairs[u], turns);
    const uint16_t first = _mm512_cmpge_epu32_mask(turned, limit);
    const uint16_t second = _mm512_cmpge_epu32_mask(_mm512_rol_epi32(turned, 8), limit);
    __builtin_memcpy(kept + 2 * u * 8, &first, 2);
    __builtin_memcpy(kept + (2 * u + 8) * 8, &second, 2);
  }
}

}  // namespace
}  // namespace fusedformer
