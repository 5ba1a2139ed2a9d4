// Vectors of floats for the instruction set that this file is compiled for, under the same names:
//
//   Vec, LANES                a vector of LANES floats (or of LANES words of 32 bits)
//   ROWS, COLUMNS             how many vectors of sums a matrix product keeps in registers
//   load, store, set, zero    no alignment is asked
//   fma, fms, nfma            a b + c, a b - c, c - a b
//   larger                    the larger one; b where one is NaN
//   eighths                   for x = n ln 2 / 8 + r with a whole n: r, 2^(n/8), and what that
//                             lacks, in parts of it; for x from 127 ln 2 below 0, where it is 0
//   Lanes, lanes, where, fma_where    some lanes: from bits, x or 0, a b + c or c
//   from_ and to_ float16 and bfloat16, transpose
//   pin                       keeps a loaded vector in a register: GCC would otherwise load it
//                             again in each instruction that uses it
//   Words, WORDS, ...         for the random numbers
#pragma once

#include <stdint.h>

namespace fusedformer {
namespace {

constexpr float LOG2E = 0x1.715476p+0f, LN2 = 0x1.62e430p-1f;  // to 2^-25 and 2^-28

// The powers 2^(k/8) for k from 0 to 7, rounded to floats: their bits, less k << 20, so that adding
// n << 20 gives the bits of 2^(n/8) for every n whose last three bits are k. And what they lack.
alignas(32) constexpr uint32_t POWERS[8] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                            0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
alignas(32) constexpr float LACKING[8] = {0.0f,
                                          -0x1.9c0c22p-27f,
                                          0x1.125002p-25f,
                                          -0x1.0a3550p-25f,
                                          0x1.26055cp-26f,
                                          0x1.67a1cap-28f,
                                          -0x1.f9c304p-27f,
                                          -0x1.a5217cp-28f};
constexpr float WHOLE = 0x1.8p23f;  // a sum with it is rounded to a whole number, in its last bits

}  // namespace
}  // namespace fusedformer

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "attention_simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "attention_simd_avx2.h"
#else
#include "attention_simd_portable.h"
#endif

namespace fusedformer {
namespace {

// For loops over registers, which have to be unrolled: an index that is not a constant would put
// all of them in memory.
#define FUSEDFORMER_UNROLL _Pragma("GCC unroll 16")
#define FUSEDFORMER_APART __attribute__((noinline))
#define FUSEDFORMER_LAMBDA __attribute__((always_inline))

template <int N>
struct Int {
  static constexpr int value = N;
};

// body(Int<N>, at) for as many strips of N from `at` to `end` as fit, then for shorter ones, whose
// lengths are few: each is code of its own.
template <int N, class Body>
FUSEDFORMER_INLINE void each_strip(int at, int end, Body&& body) {
  for (; at + N <= end; at += N) {
    // Eight make two strips of four: after one of six, two rows would wait for their own few sums.
    if (N == 6 && at + 8 == end) break;
    body(Int<N>{}, at);
  }
  if constexpr (N > 1) each_strip<(N > 4 ? 4 : N / 2)>(at, end, body);
}

// The same for vectors side by side: COLUMNS, then one by one.
template <class Body>
FUSEDFORMER_INLINE void each_panel(int end, Body&& body) {
  int at = 0;
  for (; at + COLUMNS <= end; at += COLUMNS) body(Int<COLUMNS>{}, at);
  for (; at < end; ++at) body(Int<1>{}, at);
}

constexpr int rounded_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace
}  // namespace fusedformer
