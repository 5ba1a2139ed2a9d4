// Four floats, in the vectors that GCC and Clang have for every processor. See attention_simd.h.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fusedformer {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Lanes __attribute__((vector_size(16)));  // all ones where set
constexpr int LANES = 4;
constexpr int ROWS = 4, COLUMNS = 2;  // 8 sums, 2 vectors of B and one of A in 16 registers

inline Vec zero() { return Vec{}; }
inline Vec set(float x) { return Vec{x, x, x, x}; }
inline Vec load(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof x); }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec fms(Vec a, Vec b, Vec c) { return a * b - c; }
inline Vec nfma(Vec a, Vec b, Vec c) { return c - a * b; }
inline Vec select(Lanes yes, Vec a, Vec b) {
  return reinterpret_cast<Vec>((reinterpret_cast<Lanes>(a) & yes) |
                               (reinterpret_cast<Lanes>(b) & ~yes));
}
inline Vec larger(Vec a, Vec b) { return select(a > b, a, b); }  // b where one is NaN
inline Vec eighths(Vec x, Vec& power, Vec& lacking) {
  typedef uint32_t Bits __attribute__((vector_size(16)));
  Vec sum = x * set(8 * LOG2E) + set(WHOLE);
  asm("" : "+m"(sum));  // so that no compiler simplifies it away
  const Vec n = sum - set(WHOLE);
  const Bits bits = reinterpret_cast<Bits>(sum);
  const Bits k = bits & 7;
  const Bits powers = {POWERS[k[0]], POWERS[k[1]], POWERS[k[2]], POWERS[k[3]]};
  lacking = Vec{LACKING[k[0]], LACKING[k[1]], LACKING[k[2]], LACKING[k[3]]};
  power = reinterpret_cast<Vec>(powers + (bits << 20));
  // ln 2 / 8 in two parts, as products are rounded here.
  return x - n * set(0x1.62e4p-4f) - n * set(0x1.7f7d1cp-23f);
}
inline void pin(Vec&) {}

inline Lanes lanes(const uint8_t* bits, int vector) {
  const int here = bits[vector / 2] >> 4 * (vector % 2);
  return Lanes{-(here & 1), -(here >> 1 & 1), -(here >> 2 & 1), -(here >> 3 & 1)};
}
inline Vec where(Lanes kept, Vec x) { return select(kept, x, zero()); }
inline Vec fma_where(Lanes kept, Vec a, Vec b, Vec c) { return select(kept, fma(a, b, c), c); }

inline float as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7FFF;
  if (rest >= 0x7C00) return as_float(sign | 0x7F800000 | (rest & 0x3FF) << 13);
  // Shifted into place, the exponent lacks 112; a product with a power of two adds it, and takes
  // subnormal numbers along.
  return as_float(as_bits(as_float(rest << 13) * 0x1p112f) | sign);
}
inline uint16_t half_of_float(float x) {
  const uint32_t sign = as_bits(x) >> 16 & 0x8000;
  const uint32_t rest = as_bits(x) & 0x7FFFFFFF;
  if (rest > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (rest >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds to infinity
  if (rest < 0x38800000) {
    // Subnormal: 0.5 has the weight of 2^-24 in its last bit, so the sum is rounded to those.
    return static_cast<uint16_t>(sign | (as_bits(as_float(rest) + 0.5f) - as_bits(0.5f)));
  }
  return static_cast<uint16_t>(sign | ((rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13));
}

inline Vec from_float16(const uint16_t* p) {
  return Vec{float_of_half(p[0]), float_of_half(p[1]), float_of_half(p[2]), float_of_half(p[3])};
}
inline Vec from_bfloat16(const uint16_t* p) {
  Vec x;
  for (int lane = 0; lane < LANES; ++lane) x[lane] = as_float(static_cast<uint32_t>(p[lane]) << 16);
  return x;
}
inline void to_float16(uint16_t* p, Vec x) {
  for (int lane = 0; lane < LANES; ++lane) p[lane] = half_of_float(x[lane]);
}
inline void to_bfloat16(uint16_t* p, Vec x) {
  for (int lane = 0; lane < LANES; ++lane) {
    const uint32_t bits = as_bits(x[lane]);
    const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    p[lane] = static_cast<uint16_t>(nan ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
}

// to[c][r] = from[r][c], for LANES x LANES words.
inline void transpose(const float* from, ptrdiff_t from_stride, float* to, ptrdiff_t to_stride) {
  for (int r = 0; r < LANES; ++r)
    for (int c = 0; c < LANES; ++c) to[c * to_stride + r] = from[r * from_stride + c];
}

// Words in the low halves of 64 bits, as Philox multiplies them.
struct Words {
  uint64_t word[4];
};
constexpr int WORDS = 4;

inline Words set_word(uint32_t x) { return {{x, x, x, x}}; }
inline Words load_words(const uint64_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline Words sum(Words a, Words b) {
  for (int k = 0; k < WORDS; ++k) a.word[k] += b.word[k];
  return a;
}
inline Words product(Words a, Words b) {
  for (int k = 0; k < WORDS; ++k)
    a.word[k] = (a.word[k] & 0xFFFFFFFFu) * (b.word[k] & 0xFFFFFFFFu);
  return a;
}
inline Words high(Words x) {
  for (int k = 0; k < WORDS; ++k) x.word[k] >>= 32;
  return x;
}
inline Words xor3(Words a, Words b, Words c) {
  for (int k = 0; k < WORDS; ++k) a.word[k] ^= b.word[k] ^ c.word[k];
  return a;
}

// See attention_random.h.
inline void store_kept(Words even, Words odd, uint32_t threshold, uint8_t* kept) {
  for (int byte = 0; byte < 4; ++byte) {
    uint8_t bits = 0;
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = static_cast<uint32_t>(i % 2 ? odd.word[i / 2] : even.word[i / 2]);
      const uint32_t turned = byte ? word << 8 * byte | word >> (32 - 8 * byte) : word;
      bits = static_cast<uint8_t>(bits | (turned >= threshold) << i);
    }
    kept[byte % 2 * 64 + byte / 2] = bits;
  }
}

}  // namespace
}  // namespace fusedformer
