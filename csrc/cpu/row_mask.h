// Dropout masks of rows: random words, four for each 16 columns, made for many columns at a time.
// What they decide is worked out where it is used, by a load, a rotation and a comparison: less
// than packing it as bits and taking them apart again.
#pragma once

#include "../philox.h"
#include "row_simd.h"
#include "rows.h"

namespace fusedformer {
namespace {

#if defined(__AVX2__)

// Counters and words in the lower halves of 64-bit lanes: a product then needs no shuffle, and what
// lands in the upper halves is never read.
#if defined(__AVX512F__)
using Calls = __m512i;
constexpr int kCalls = 8;
inline Calls calls(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
inline Calls times(Calls a, Calls b) { return _mm512_mul_epu32(a, b); }
inline Calls high(Calls a) { return _mm512_srli_epi64(a, 32); }
inline Calls three_xor(Calls a, Calls b, Calls c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
#else
using Calls = __m256i;
constexpr int kCalls = 4;
inline Calls calls(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
inline Calls times(Calls a, Calls b) { return _mm256_mul_epu32(a, b); }
inline Calls high(Calls a) { return _mm256_srli_epi64(a, 32); }
inline Calls three_xor(Calls a, Calls b, Calls c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
#endif

inline void philox4x32(uint64_t seed, Calls c[4]) {
  const Calls m0 = calls(philox::kMultiplier0), m1 = calls(philox::kMultiplier1);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 7
  for (int round = 0; round < philox::kRounds; ++round) {
    const Calls product0 = times(c[0], m0), product1 = times(c[2], m1);
    c[0] = three_xor(high(product1), c[1], calls(k0));
    c[1] = product1;
    c[2] = three_xor(high(product0), c[3], calls(k1));
    c[3] = product0;
    k0 += philox::kWeyl0;
    k1 += philox::kWeyl1;
  }
}

// The four words of each call side by side.
inline void store_words(const Calls c[4], uint32_t* words) {
#if defined(__AVX512F__)
  const __m512i w01 = _mm512_mask_blend_epi32(0xAAAA, c[0], _mm512_slli_epi64(c[1], 32));
  const __m512i w23 = _mm512_mask_blend_epi32(0xAAAA, c[2], _mm512_slli_epi64(c[3], 32));
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(words, _mm512_permutex2var_epi64(w01, first, w23));
  _mm512_storeu_si512(words + 16, _mm512_permutex2var_epi64(w01, second, w23));
#else
  const __m256i w01 = _mm256_blend_epi32(c[0], _mm256_slli_epi64(c[1], 32), 0xAA);
  const __m256i w23 = _mm256_blend_epi32(c[2], _mm256_slli_epi64(c[3], 32), 0xAA);
  const __m256i even = _mm256_unpacklo_epi64(w01, w23), odd = _mm256_unpackhi_epi64(w01, w23);
  __m256i* out = reinterpret_cast<__m256i*>(words);
  _mm256_storeu_si256(out, _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(even, odd, 0x31));
#endif
}

#else

constexpr int kCalls = 1;

#endif

// The words of n_calls calls from first_call on, for each of n_rows rows from first_row on: four at
// words + 4 (n_calls row + call). Fills whole vectors: up to 7 calls more. Not inline, as it is
// much code and runs for a row or more.
__attribute__((noinline)) void rows_words(uint64_t seed, uint32_t tag, int64_t first_row,
                                          int64_t n_rows, int64_t first_call, int64_t n_calls,
                                          uint32_t* words) {
  int64_t row = first_row, call = 0;
  const int64_t total = n_rows * n_calls;
  // The calls of consecutive positions go on into the next row, so that short rows fill vectors.
  for (int64_t at = 0; at < total; at += kCalls) {
#if defined(__AVX2__)
    alignas(64) uint64_t counter[4][kCalls];
    Calls c[4];
    if (call + kCalls <= n_calls) {
      // All in one row, the usual case.
      uint32_t start[4];
      philox::rows_counter(row, first_call + call, tag, start);
#if defined(__AVX512F__)
      c[0] = _mm512_add_epi64(calls(start[0]), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
#else
      c[0] = _mm256_add_epi64(calls(start[0]), _mm256_setr_epi64x(0, 1, 2, 3));
#endif
      for (int n = 1; n < 4; ++n) c[n] = calls(start[n]);
      call += kCalls;
      if (call == n_calls) {
        call = 0;
        ++row;
      }
    } else {
      for (int lane = 0; lane < kCalls; ++lane) {
        uint32_t start[4];
        philox::rows_counter(row, first_call + call, tag, start);
        for (int n = 0; n < 4; ++n) counter[n][lane] = start[n];
        if (++call == n_calls) {
          call = 0;
          ++row;
        }
      }
      memcpy(c, counter, sizeof c);
    }
    philox4x32(seed, c);
    store_words(c, words + 4 * at);
#else
    philox::rows_counter(row, first_call + call, tag, words + 4 * at);
    philox::philox4x32(seed, words + 4 * at);
    if (++call == n_calls) {
      call = 0;
      ++row;
    }
#endif
  }
}

// The masks of a tile's rows, which are asked for in ascending order.
class Masks {
 public:
  Masks(const Dropout& dropout, uint32_t tag, const Tile& tile, uint32_t* words)
      : dropout_(dropout),
        tag_(tag),
        tile_(tile),
        words_(words),
        calls_((tile.until - tile.from + kLanes - 1) / kLanes),
        rows_(calls_ < kMaskCalls ? kMaskCalls / calls_ : 1),
        made_(tile.first) {}

  // Four words for each call of the row; missing where there is no dropout.
  const uint32_t* of(int64_t row) {
    if (!dropout_.on) return nullptr;
    if (row >= made_) make(row);
    return current() + 4 * (row - start_) * calls_;
  }

  // Makes the next row's mask, if it is not there, beside that of the row asked for last. To be
  // called where the processor would wait for a sum.
  void prepare(int64_t row) {
    if (dropout_.on && row == made_ && row < tile_.last) make(row);
  }

 private:
  uint32_t* current() const { return second_ ? words_ + mask_room(calls_) / 2 : words_; }

  void make(int64_t row) {
    second_ = !second_;
    start_ = row;
    made_ = row + rows_ < tile_.last ? row + rows_ : tile_.last;
    rows_words(dropout_.seed, tag_, start_, made_ - start_, tile_.from / kLanes, calls_, current());
  }

  const Dropout& dropout_;
  const uint32_t tag_;
  const Tile tile_;
  uint32_t* const words_;
  const int64_t calls_, rows_;
  int64_t made_, start_ = 0;
  bool second_ = false;
};

template <class T>
const T* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.stride;
}
template <class T>
T* row_to(const Matrix& matrix, int64_t row) {
  return static_cast<T*>(matrix.data) + row * matrix.stride;
}

// Decides from the four words of a call which of its 16 elements are kept: element e by word e % 4,
// rotated by e / 4 bytes.
class Keep {
 public:
  explicit Keep(const Dropout& dropout) : scale_(splat(dropout.scale)) {
#if defined(__AVX512F__)
    threshold_ = _mm512_set1_epi32(static_cast<int>(dropout.threshold));
#elif defined(__AVX2__)
    threshold_ = _mm256_set1_epi32(static_cast<int>(dropout.threshold));
#else
    threshold_ = dropout.threshold;
#endif
  }

  // Those kept are scaled, those dropped are 0 whatever they held.
  Floats operator()(const Floats& x, const uint32_t* words) const {
    return select(kept(words), x * scale_, splat(0.0f));
  }

 private:
#if defined(__AVX512F__)
  Mask kept(const uint32_t* words) const {
    const __m512i rotations =
        _mm512_setr_epi32(0, 0, 0, 0, 8, 8, 8, 8, 16, 16, 16, 16, 24, 24, 24, 24);
    const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words));
    const __m512i all = _mm512_rolv_epi32(_mm512_broadcast_i32x4(four), rotations);
    return _mm512_cmpge_epu32_mask(all, threshold_);
  }
  __m512i threshold_;
#elif defined(__AVX2__)
  Mask kept(const uint32_t* words) const {
    // A rotation by bytes is an order of bytes.
    const __m128i byte0 = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m128i byte1 = _mm_setr_epi8(3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14);
    const __m128i byte2 = _mm_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    const __m128i byte3 = _mm_setr_epi8(1, 2, 3, 0, 5, 6, 7, 4, 9, 10, 11, 8, 13, 14, 15, 12);
    const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words));
    const __m256i all = _mm256_broadcastsi128_si256(four);
    return {at_least(_mm256_shuffle_epi8(all, _mm256_setr_m128i(byte0, byte1))),
            at_least(_mm256_shuffle_epi8(all, _mm256_setr_m128i(byte2, byte3)))};
  }
  __m256 at_least(__m256i x) const {
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(x, threshold_), x));
  }
  __m256i threshold_;
#else
  Mask kept(const uint32_t* words) const {
    typedef uint32_t FourWords __attribute__((vector_size(16)));
    const FourWords least = FourWords{} + threshold_;
    FourWords four;
    memcpy(&four, words, sizeof four);
    Mask mask;
    mask.v[0] = four >= least;
    for (int byte = 1; byte < 4; ++byte)
      mask.v[byte] = (four << 8 * byte | four >> (32 - 8 * byte)) >= least;
    return mask;
  }
  uint32_t threshold_;
#endif
  Floats scale_;
};

}  // namespace
}  // namespace fusedformer
