// 16 floats in vectors of 16 bytes, which GCC and clang map to what the baseline has (SSE2, NEON).
// See row_simd.h.
#pragma once

namespace fusedformer {
namespace {

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

struct Floats {
  Four v[4];
};
struct Mask {
  FourInts v[4];  // -1 or 0
};

#define FUSEDFORMER_EACH(Result, expression)           \
  Result out;                                          \
  for (int n = 0; n < 4; ++n) out.v[n] = (expression); \
  return out

inline Four select(FourInts mask, Four a, Four b) {
  return (Four)(((FourInts)a & mask) | ((FourInts)b & ~mask));
}
inline Four power_of_two(FourInts n) { return (Four)((n + 127) << 23); }
inline Four scale_by_power(Four a, Four n) {
  // A NaN has no int; the product is NaN all the same. In two steps, as 2^n may be out of range.
  const FourInts whole = __builtin_convertvector(select(n == n, n, Four{}), FourInts);
  const FourInts half = whole >> 1;
  return a * power_of_two(half) * power_of_two(whole - half);
}

inline Floats splat(float x) { FUSEDFORMER_EACH(Floats, (Four{x, x, x, x})); }
inline Floats operator+(const Floats& a, const Floats& b) {
  FUSEDFORMER_EACH(Floats, a.v[n] + b.v[n]);
}
inline Floats operator-(const Floats& a, const Floats& b) {
  FUSEDFORMER_EACH(Floats, a.v[n] - b.v[n]);
}
inline Floats operator*(const Floats& a, const Floats& b) {
  FUSEDFORMER_EACH(Floats, a.v[n] * b.v[n]);
}
inline Floats operator/(const Floats& a, const Floats& b) {
  FUSEDFORMER_EACH(Floats, a.v[n] / b.v[n]);
}
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
  FUSEDFORMER_EACH(Floats, a.v[n] * b.v[n] + c.v[n]);
}
inline Floats fnma(const Floats& a, const Floats& b, const Floats& c) {
  FUSEDFORMER_EACH(Floats, c.v[n] - a.v[n] * b.v[n]);
}
inline Floats select(const Mask& m, const Floats& a, const Floats& b) {
  FUSEDFORMER_EACH(Floats, select(m.v[n], a.v[n], b.v[n]));
}
inline Floats max(const Floats& a, const Floats& b) {
  FUSEDFORMER_EACH(Floats, select(a.v[n] > b.v[n], a.v[n], b.v[n]));
}
inline Floats min(const Floats& a, const Floats& b) {
  FUSEDFORMER_EACH(Floats, select(a.v[n] < b.v[n], a.v[n], b.v[n]));
}
inline Floats abs(const Floats& a) {
  FUSEDFORMER_EACH(Floats, (Four)((FourInts)a.v[n] & 0x7FFFFFFF));
}
inline Mask greater(const Floats& a, const Floats& b) { FUSEDFORMER_EACH(Mask, a.v[n] > b.v[n]); }
inline Mask lanes(uint16_t bits) {
  const FourInts one = {1, 2, 4, 8};
  FUSEDFORMER_EACH(Mask, ((FourInts{} + (bits >> 4 * n)) & one) == one);
}
// Adding and taking away 1.5 2^23 rounds to an integer, for what is not larger than 2^22.
inline Floats round_even(const Floats& a) {
  FUSEDFORMER_EACH(Floats, (a.v[n] + 12582912.0f) - 12582912.0f);
}
inline Floats scale_by_power(const Floats& a, const Floats& b) {
  FUSEDFORMER_EACH(Floats, scale_by_power(a.v[n], b.v[n]));
}
#undef FUSEDFORMER_EACH

// In the order of AVX-512's: halves, quarters, ...
inline float sum(const Floats& a) {
  const Four four = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
inline float largest(const Floats& a) {
  float found = a.v[0][0];
  for (int n = 1; n < kLanes; ++n) found = a.v[n / 4][n % 4] > found ? a.v[n / 4][n % 4] : found;
  return found;
}

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float widened(float x) { return x; }
inline float widened(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float widened(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7FFFu;
  if (rest >= 0x7C00) return as_float(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
  // Moved to the exponent of float32 by a product, which makes subnormal numbers normal.
  return as_float(sign | as_bits(as_float(rest << 13) * 0x1p112f));
}
inline float narrowed(float x, float*) { return x; }
inline BFloat16 narrowed(float x, BFloat16*) {
  const uint32_t bits = as_bits(x);
  const uint32_t up = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>(x == x ? up : 0x7FC0)};
}
inline Half narrowed(float x, Half*) {
  const uint32_t sign = as_bits(x) >> 16 & 0x8000u, bits = as_bits(x) & 0x7FFFFFFFu;
  uint32_t half;
  if (bits > 0x7F800000u)
    half = 0x7E00;
  else if (bits >= 0x477FF000u)  // 65520, halfway from the largest number to what would follow
    half = 0x7C00;
  else if (bits < 0x38800000u)  // subnormal: adding 0.5 rounds at 2^-24, a Half's last place there
    half = as_bits(as_float(bits) + 0.5f) - as_bits(0.5f);
  else
    half = (bits - 0x38000000u + 0xFFF + (bits >> 13 & 1)) >> 13;
  return {static_cast<uint16_t>(sign | half)};
}

// Not inline, as 16 conversions one by one are much code.
template <class T>
__attribute__((noinline)) Floats load_some(const T* p, int lanes) {
  Floats out = {};
  for (int n = 0; n < lanes; ++n) out.v[n / 4][n % 4] = widened(p[n]);
  return out;
}
template <class T>
__attribute__((noinline)) void store_some(T* p, const Floats& a, int lanes) {
  for (int n = 0; n < lanes; ++n) p[n] = narrowed(a.v[n / 4][n % 4], p);
}
inline Floats load(const float* p, Whole) {
  Floats out;
  memcpy(&out, p, sizeof out);
  return out;
}
inline void store(float* p, const Floats& a, Whole) { memcpy(p, &a, sizeof a); }
template <class T>
inline Floats load(const T* p, Whole) {
  return load_some(p, kLanes);
}
template <class T>
inline Floats load(const T* p, Part part) {
  return load_some(p, part.lanes);
}
template <class T>
inline void store(T* p, const Floats& a, Whole) {
  store_some(p, a, kLanes);
}
template <class T>
inline void store(T* p, const Floats& a, Part part) {
  store_some(p, a, part.lanes);
}
template <class T>
inline void stream(T* p, const Floats& a) {
  store(p, a, Whole{});
}
inline void fence() {}
inline Floats as_stored(const Floats& a, float*) { return a; }
template <class T>
inline Floats as_stored(const Floats& a, T*) {
  T all[kLanes];
  store(all, a, Whole{});
  return load(all, Whole{});
}

}  // namespace
}  // namespace fusedformer
