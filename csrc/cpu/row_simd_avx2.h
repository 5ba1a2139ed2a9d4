// 16 floats in two AVX2 registers. See row_simd.h.
#pragma once

#include <immintrin.h>

namespace fusedformer {
namespace {

struct Floats {
  __m256 lo, hi;
};
using Mask = Floats;  // all bits of a lane

inline Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats operator+(Floats a, Floats b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline Floats operator-(Floats a, Floats b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline Floats operator*(Floats a, Floats b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline Floats operator/(Floats a, Floats b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Floats fnma(Floats a, Floats b, Floats c) {
  return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
inline Floats max(Floats a, Floats b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
inline Floats min(Floats a, Floats b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
inline Floats abs(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline Mask greater(Floats a, Floats b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)};
}
inline Floats select(Mask m, Floats a, Floats b) {
  return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
}
inline Mask lanes(uint16_t bits) {
  const __m256i all = _mm256_set1_epi32(bits);
  const __m256i lo = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i hi = _mm256_slli_epi32(lo, 8);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, lo), lo)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, hi), hi))};
}
inline Floats round_even(Floats a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
inline __m256 power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline __m256 scale_by_power(__m256 a, __m256 n) {
  // In two steps, as 2^n itself may be out of range.
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return _mm256_mul_ps(_mm256_mul_ps(a, power_of_two(half)),
                       power_of_two(_mm256_sub_epi32(whole, half)));
}
inline Floats scale_by_power(Floats a, Floats n) {
  return {scale_by_power(a.lo, n.lo), scale_by_power(a.hi, n.hi)};
}

// In the order of AVX-512's: halves, quarters, ...
inline float sum(Floats a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(Floats a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline __m256 widen(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Floats load(const float* p, Whole) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats load(const Half* p, Whole) {
  const __m128i* bits = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(bits)), _mm256_cvtph_ps(_mm_loadu_si128(bits + 1))};
}
inline Floats load(const BFloat16* p, Whole) {
  const __m128i* bits = reinterpret_cast<const __m128i*>(p);
  return {widen(_mm_loadu_si128(bits)), widen(_mm_loadu_si128(bits + 1))};
}
template <class T>
inline Floats load(const T* p, Part n) {
  T whole[kLanes] = {};
  memcpy(whole, p, n.lanes * sizeof(T));
  return load(whole, Whole{});
}

inline __m256i rounded(Floats a, Half*) {
  return _mm256_setr_m128i(_mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT),
                           _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
inline __m256i to_bfloat16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7FC0), nan);
}
inline __m256i rounded(Floats a, BFloat16*) {
  // packus works within halves of a register; the permutation puts its quarters in order.
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(to_bfloat16(a.lo), to_bfloat16(a.hi)), 0xD8);
}
inline void store(float* p, Floats a, Whole) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
template <class T>
inline void store(T* p, Floats a, Whole) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(a, p));
}
template <class T>
inline void store(T* p, Floats a, Part n) {
  T whole[kLanes];
  store(whole, a, Whole{});
  memcpy(p, whole, n.lanes * sizeof(T));
}
inline void stream(float* p, Floats a) {
  _mm256_stream_ps(p, a.lo);
  _mm256_stream_ps(p + 8, a.hi);
}
template <class T>
inline void stream(T* p, Floats a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), rounded(a, p));
}
inline void fence() { _mm_sfence(); }
inline Floats as_stored(Floats a, float*) { return a; }
inline Floats as_stored(Floats a, Half* p) {
  const __m256i bits = rounded(a, p);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(bits)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1))};
}
inline Floats as_stored(Floats a, BFloat16*) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(to_bfloat16(a.lo), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(to_bfloat16(a.hi), 16))};
}

}  // namespace
}  // namespace fusedformer
