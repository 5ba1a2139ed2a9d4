// 16 lanes of float32, whatever the instruction set: one AVX-512 register, two of AVX2, or four
// vectors of what the baseline has. The row kernels are written once, on these.
//
// 16 because a call of the random-number contract decides 16 neighbouring columns. Sums are added
// in the same order everywhere, so results differ between instruction sets by fused products alone.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "rows.h"

namespace fusedformer {
namespace {

constexpr int kLanes = 16;

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// run(T{}), T being the elements of a dtype. In the code of avx512bf16 that is bfloat16 alone: what
// has none gains nothing by that code, and is handed to avx512's by others(its table).
template <class Table, class Run, class Others>
inline __attribute__((always_inline)) void by_dtype(Type type, const Table& avx512, const Run& run,
                                                    const Others& others) {
#ifdef __AVX512BF16__
  if (type != Type::bfloat16) return others(avx512);
#else
  (void)avx512, (void)others;
  if (type == Type::float32) return run(float{});
  if (type == Type::float16) return run(Half{});
#endif
  run(BFloat16{});
}

// How many lanes of a load or store lie inside the row: all, or the first few.
struct Whole {};
struct Part {
  int lanes;
};

}  // namespace
}  // namespace fusedformer

// Floats and Mask; splat, + - * /, fma (a b + c), fnma (c - a b), max and min (the second operand
// where either is a NaN), abs, greater, select, lanes (a Mask of 16 bits), round_even,
// scale_by_power (a 2^n, n whole), sum, largest; load and store of float, Half and BFloat16, stream
// (a store past the caches), as_stored (what a load would give of a store), fence.
#if defined(__AVX512F__)
#include "row_simd_avx512.h"
#elif defined(__AVX2__)
#include "row_simd_avx2.h"
#else
#include "row_simd_portable.h"
#endif

namespace fusedformer {
namespace {

// Stores whole vectors past the caches if asked.
template <class T>
inline void put(T* p, const Floats& a, Whole n, bool past_caches) {
  if (past_caches)
    stream(p, a);
  else
    store(p, a, n);
}
template <class T>
inline void put(T* p, const Floats& a, Part n, bool) {
  store(p, a, n);
}

// Asks for a cache line that the loop over columns will come to 2 KB later, in this row or the next
// ones: several matrices read and written in turns are more than the processor foresees by itself,
// least of all the lines that it must read before it writes them. u is that of for_columns(): of 16
// bits, two steps share a line. What lies past a matrix is never touched.
enum Purpose { for_reading, for_writing };
template <Purpose purpose = for_reading, class T>
inline void fetch(const T* p, int u) {
  if (sizeof(T) == 4 || u % 2 == 0) __builtin_prefetch(p + 2048 / sizeof(T), purpose);
}

// What lies past the end of a row counts as 0 in a sum, as -infinity in a maximum.
inline Floats inside(const Floats& a, Whole, float = 0.0f) { return a; }
inline Floats inside(const Floats& a, Part part, float outside = 0.0f) {
  return select(lanes(static_cast<uint16_t>((1u << part.lanes) - 1)), a, splat(outside));
}

// body(column, u, Whole or Part) for every 16 columns of a row; u is 0 to unroll - 1 in turn, known
// when compiled: the accumulator to add to, so that a sum need not wait for the one before it.
template <int unroll, class Body>
inline __attribute__((always_inline)) void for_columns(int64_t width, Body body) {
  int64_t column = 0;
  for (; column + unroll * kLanes <= width; column += unroll * kLanes) {
#pragma GCC unroll 4
    for (int u = 0; u < unroll; ++u) body(column + u * kLanes, u, Whole{});
  }
  for (; column < width; column += kLanes) {
    const int64_t left = width - column;
    body(column, 0, Part{left < kLanes ? static_cast<int>(left) : kLanes});
  }
}

// Accumulators for an unrolled loop.
template <int unroll>
struct Sums {
  Floats v[unroll];
  Sums() {
    for (Floats& each : v) each = splat(0.0f);
  }
  float total() const {
    Floats all = v[0];
    for (int u = 1; u < unroll; ++u) all = all + v[u];
    return sum(all);
  }
};

}  // namespace
}  // namespace fusedformer
