// Dropout masks of rows: 16 bits, one for each column of a call, for many calls at a time.
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

#if defined(__AVX512F__)
// Of the call in a quarter of a register: which of its 16 elements are kept.
template <int quarter>
inline uint16_t kept(__m512i words, __m512i threshold) {
  const __m512i rotations =
      _mm512_setr_epi32(0, 0, 0, 0, 8, 8, 8, 8, 16, 16, 16, 16, 24, 24, 24, 24);
  const __m512i all = _mm512_shuffle_i32x4(words, words, 0x55 * quarter);
  return _mm512_cmpge_epu32_mask(_mm512_rolv_epi32(all, rotations), threshold);
}

inline void keep_bits(const Calls c[4], uint32_t threshold, uint16_t* bits) {
  const __m512i limit = _mm512_set1_epi32(static_cast<int>(threshold));
  // Words 0 and 1, then 2 and 3, of each call side by side; then all four of every other call.
  const __m512i w01 = _mm512_mask_blend_epi32(0xAAAA, c[0], _mm512_slli_epi64(c[1], 32));
  const __m512i w23 = _mm512_mask_blend_epi32(0xAAAA, c[2], _mm512_slli_epi64(c[3], 32));
  const __m512i even = _mm512_unpacklo_epi64(w01, w23), odd = _mm512_unpackhi_epi64(w01, w23);
  bits[0] = kept<0>(even, limit);
  bits[1] = kept<0>(odd, limit);
  bits[2] = kept<1>(even, limit);
  bits[3] = kept<1>(odd, limit);
  bits[4] = kept<2>(even, limit);
  bits[5] = kept<2>(odd, limit);
  bits[6] = kept<3>(even, limit);
  bits[7] = kept<3>(odd, limit);
}
#else
inline uint16_t kept(__m256i words, __m256i below) {
  // Bytes 0 and 1 in one register, 2 and 3 in the other. x < t is min(x, t - 1) == x.
  const auto dropped = [&](__m256i left, __m256i right) {
    const __m256i x =
        _mm256_or_si256(_mm256_sllv_epi32(words, left), _mm256_srlv_epi32(words, right));
    const __m256i drop = _mm256_cmpeq_epi32(_mm256_min_epu32(x, below), x);
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(drop)));
  };
  const unsigned low = dropped(_mm256_setr_epi32(0, 0, 0, 0, 8, 8, 8, 8),
                               _mm256_setr_epi32(32, 32, 32, 32, 24, 24, 24, 24));
  const unsigned top = dropped(_mm256_setr_epi32(16, 16, 16, 16, 24, 24, 24, 24),
                               _mm256_setr_epi32(16, 16, 16, 16, 8, 8, 8, 8));
  return static_cast<uint16_t>(~(low | top << 8));
}

inline void keep_bits(const Calls c[4], uint32_t threshold, uint16_t* bits) {
  if (threshold == 0) {
    memset(bits, 0xFF, kCalls * sizeof *bits);
    return;
  }
  const __m256i below = _mm256_set1_epi32(static_cast<int>(threshold - 1));
  const __m256i w01 = _mm256_blend_epi32(c[0], _mm256_slli_epi64(c[1], 32), 0xAA);
  const __m256i w23 = _mm256_blend_epi32(c[2], _mm256_slli_epi64(c[3], 32), 0xAA);
  const __m256i even = _mm256_unpacklo_epi64(w01, w23), odd = _mm256_unpackhi_epi64(w01, w23);
  bits[0] = kept(_mm256_permute2x128_si256(even, even, 0x00), below);
  bits[1] = kept(_mm256_permute2x128_si256(odd, odd, 0x00), below);
  bits[2] = kept(_mm256_permute2x128_si256(even, even, 0x11), below);
  bits[3] = kept(_mm256_permute2x128_si256(odd, odd, 0x11), below);
}
#endif

#else

constexpr int kCalls = 1;

#endif

// The bits of n_calls calls from first_call on, for each of n_rows rows from first_row on:
// bits[n_calls * row + call], 1 = kept. Fills whole vectors: up to 7 more. Not inline,
// as it is much code and runs for a row or more.
__attribute__((noinline)) void rows_keep(uint64_t seed, uint32_t tag, uint32_t threshold,
                                         int64_t first_row, int64_t n_rows, int64_t first_call,
                                         int64_t n_calls, uint16_t* bits) {
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
    keep_bits(c, threshold, bits + at);
#else
    uint32_t words[4];
    philox::rows_counter(row, first_call + call, tag, words);
    philox::philox4x32(seed, words);
    unsigned kept = 0;
    for (int element = 0; element < kLanes; ++element)
      if (philox::kept(words[element % 4], element / 4, threshold)) kept |= 1u << element;
    bits[at] = static_cast<uint16_t>(kept);
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
  Masks(const Dropout& dropout, uint32_t tag, const Tile& tile, uint16_t* bits)
      : dropout_(dropout),
        tag_(tag),
        tile_(tile),
        bits_(bits),
        calls_((tile.until - tile.from + kLanes - 1) / kLanes),
        rows_(calls_ < kMaskCalls ? kMaskCalls / calls_ : 1),
        made_(tile.first) {}

  // 16 bits for each call of the row; missing where there is no dropout.
  const uint16_t* of(int64_t row) {
    if (!dropout_.on) return nullptr;
    if (row >= made_) make(row);
    return current() + (row - start_) * calls_;
  }

  // Makes the next row's mask, if it is not there, beside that of the row asked for last. To be
  // called where the processor would wait for a sum.
  void prepare(int64_t row) {
    if (dropout_.on && row == made_ && row < tile_.last) make(row);
  }

 private:
  uint16_t* current() const { return second_ ? bits_ + mask_room(calls_) / 2 : bits_; }

  void make(int64_t row) {
    second_ = !second_;
    start_ = row;
    made_ = row + rows_ < tile_.last ? row + rows_ : tile_.last;
    rows_keep(dropout_.seed, tag_, dropout_.threshold, start_, made_ - start_, tile_.from / kLanes,
              calls_, current());
  }

  const Dropout& dropout_;
  const uint32_t tag_;
  const Tile tile_;
  uint16_t* const bits_;
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

// Applies a mask to 16 values: those kept are scaled, those dropped are 0 whatever they held.
inline Floats dropped(const Floats& x, uint16_t bits, const Floats& scale) {
  return select(lanes(bits), x * scale, splat(0.0f));
}

}  // namespace
}  // namespace fusedformer
