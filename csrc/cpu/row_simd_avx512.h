// 16 floats in an AVX-512 register. See row_simd.h.
#pragma once

#include <immintrin.h>

namespace fusedformer {
namespace {

struct Floats {
  __m512 v;
};
using Mask = __mmask16;

inline Floats splat(float x) { return {_mm512_set1_ps(x)}; }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats fnma(Floats a, Floats b, Floats c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline Mask greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline Floats select(Mask m, Floats a, Floats b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }
inline Mask lanes(uint16_t bits) { return bits; }
inline Floats round_even(Floats a) { return {_mm512_roundscale_ps(a.v, 0)}; }
inline Floats scale_by_power(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }

inline Mask first(Part p) { return static_cast<Mask>((1u << p.lanes) - 1); }
inline Floats widen(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
template <class T>
inline __m256i bits_at(const T* p, Whole) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
template <class T>
inline __m256i bits_at(const T* p, Part n) {
  return _mm256_maskz_loadu_epi16(first(n), p);
}
inline Floats load(const float* p, Whole) { return {_mm512_loadu_ps(p)}; }
inline Floats load(const float* p, Part n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
template <class N>
inline Floats load(const Half* p, N n) {
  return {_mm512_cvtph_ps(bits_at(p, n))};
}
template <class N>
inline Floats load(const BFloat16* p, N n) {
  return widen(bits_at(p, n));
}

inline __m256i rounded(Floats a, Half*) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }
inline __m256i rounded(Floats a, BFloat16*) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const Mask nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7FC0)));
#endif
}
inline void store(float* p, Floats a, Whole) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Floats a, Part n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
template <class T>
inline void store(T* p, Floats a, Whole) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(a, p));
}
template <class T>
inline void store(T* p, Floats a, Part n) {
  _mm256_mask_storeu_epi16(p, first(n), rounded(a, p));
}
inline void stream(float* p, Floats a) { _mm512_stream_ps(p, a.v); }
template <class T>
inline void stream(T* p, Floats a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), rounded(a, p));
}
inline void fence() { _mm_sfence(); }
inline Floats as_stored(Floats a, float*) { return a; }
inline Floats as_stored(Floats a, Half* p) { return {_mm512_cvtph_ps(rounded(a, p))}; }
inline Floats as_stored(Floats a, BFloat16* p) { return widen(rounded(a, p)); }

}  // namespace
}  // namespace fusedformer
