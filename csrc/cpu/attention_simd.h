// Vectors of floats for the instruction set that this file is compiled for, under the same names:
//
//   Vec, LANES                a vector of LANES floats (or of LANES words of 32 bits)
//   ROWS, COLUMNS             how many vectors of sums a matrix product keeps in registers
//   load, store, set, zero    no alignment is asked
//   fma, fms, nfma            a b + c, a b - c, c - a b
//   larger                    the larger one; b where one is NaN
//   rounded, times_power_of_2 to the nearest whole number; x 2^n for a whole n <= 1, 0 for n < -126
//   Lanes, lanes, where, fma_where    some lanes: from bits, x or 0, a b + c or c
//   from_ and to_ float16 and bfloat16, transpose
//   pin                       keeps a loaded vector in a register: GCC would otherwise load it
//                             again in each instruction that uses it
//   Words, WORDS, ...         for the random numbers
#pragma once

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
  for (; at + N <= end; at += N) body(Int<N>{}, at);
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
