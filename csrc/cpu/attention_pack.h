// Moving rows of tensors in and out of the layouts that the products want.
#pragma once

#include "attention_product.h"

namespace fusedformer {
namespace {

// Hands out pieces of one block of scratch memory; with none, it counts how much they need.
struct Arena {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(size_t n) {
    const size_t at = used;
    used += (n * sizeof(T) + 63) / 64 * 64;
    return base ? reinterpret_cast<T*>(base + at) : nullptr;
  }
};

inline void fill(float* to, int n, float value) {
  for (int k = 0; k < n; ++k) to[k] = value;
}

inline Vec load_as(DType dtype, const void* from) {
  if (dtype == DType::float32) return load(static_cast<const float*>(from));
  const uint16_t* half = static_cast<const uint16_t*>(from);
  return dtype == DType::float16 ? from_float16(half) : from_bfloat16(half);
}

inline void store_as(DType dtype, void* to, Vec x) {
  if (dtype == DType::float32) return store(static_cast<float*>(to), x);
  uint16_t* half = static_cast<uint16_t*>(to);
  dtype == DType::float16 ? to_float16(half, x) : to_bfloat16(half, x);
}

// n elements, `stride` bytes apart, as floats.
inline void to_floats(DType dtype, const char* from, ptrdiff_t stride, int n, float* to) {
  const int size = bytes_of(dtype);
  int done = 0;
  if (stride == size)
    for (; done + LANES <= n; done += LANES) store(to + done, load_as(dtype, from + done * size));
  for (; done < n; done += LANES) {  // what is apart, or fewer than a vector
    const int some = n - done < LANES ? n - done : LANES;
    alignas(64) char gathered[LANES * 4] = {};
    for (int k = 0; k < some; ++k)
      __builtin_memcpy(gathered + k * size, from + (done + k) * stride, size);
    alignas(64) float floats[LANES];
    store(floats, load_as(dtype, gathered));
    __builtin_memcpy(to + done, floats, some * 4);
  }
}

// n floats times a factor, side by side in another dtype.
inline void from_floats(DType dtype, const float* from, float factor, int n, char* to) {
  const int size = bytes_of(dtype);
  int done = 0;
  for (; done + LANES <= n; done += LANES)
    store_as(dtype, to + done * size, mul(load(from + done), set(factor)));
  if (done == n) return;
  alignas(64) float last[LANES] = {};
  alignas(64) char converted[LANES * 4];
  __builtin_memcpy(last, from + done, (n - done) * 4);
  store_as(dtype, converted, mul(load(last), set(factor)));
  __builtin_memcpy(to + done * size, converted, (n - done) * size);
}

// How the rows of an (N, D) matrix are laid out for a kind of arithmetic. `stride` counts words.
template <class Math>
struct Pack;

template <>
struct Pack<Float32> {
  static int words(int dim) { return dim; }

  // Whether rows are laid out as rows() would, whole vectors of words.
  static bool laid_out(DType dtype, int dim) {
    return dtype == DType::float32 && dim % LANES == 0;
  }

  // Rows as words along D, for sums over D. Up to `stride` they are filled with zeros.
  static void rows(DType dtype, const char* from, ptrdiff_t from_stride, int n, int dim, float* to,
                   int stride) {
    for (int row = 0; row < n; ++row, to += stride) {
      to_floats(dtype, from + row * from_stride, bytes_of(dtype), dim, to);
      for (int d = dim; d < stride; ++d) to[d] = 0;
    }
  }

  // Rows as steps of sums over the rows.
  static void steps(DType dtype, const char* from, ptrdiff_t from_stride, int n, int dim, float* to,
                    int stride) {
    rows(dtype, from, from_stride, n, dim, to, stride);
  }
};

#ifdef __AVX512BF16__
template <>
struct Pack<Bfloat16> {
  static int words(int dim) { return (dim + 1) / 2; }
  static bool laid_out(DType, int dim) { return dim % (2 * LANES) == 0; }

  static void rows(DType, const char* from, ptrdiff_t from_stride, int n, int dim, float* to,
                   int stride) {
    for (int row = 0; row < n; ++row) {
      char* at = reinterpret_cast<char*>(to + row * stride);
      __builtin_memcpy(at, from + row * from_stride, 2 * dim);
      __builtin_memset(at + 2 * dim, 0, 4 * stride - 2 * dim);
    }
  }

  // A word holds an element of one row and that of the next, zero after the last row.
  static void steps(DType, const char* from, ptrdiff_t from_stride, int n, int dim, float* to,
                    int stride) {
    for (int row = 0; row < n; row += 2, to += stride) {
      const char* low = from + row * from_stride;
      if (row + 1 < n)
        pair(low, low + from_stride, dim, to);
      else
        pair(low, nullptr, dim, to);
      __builtin_memset(to + dim, 0, 4 * (stride - dim));
    }
  }

 private:
  static __m512i sixteen(const char* from, int n) {
    if (!from) return _mm512_setzero_si512();
    const __mmask16 some = static_cast<__mmask16>(n < 16 ? (1 << n) - 1 : 0xFFFF);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from));
  }

  static void pair(const char* low, const char* high, int dim, float* to) {
    for (int d = 0; d < dim; d += 16) {
      const int n = dim - d;
      const __m512i a = sixteen(low + 2 * d, n), b = sixteen(high ? high + 2 * d : nullptr, n);
      const __mmask16 some = static_cast<__mmask16>(n < 16 ? (1 << n) - 1 : 0xFFFF);
      _mm512_mask_storeu_epi32(to + d, some, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
    }
  }
};
#endif

// to[w][n] = from[n][w] for n rows of some words, both multiples of LANES; TILE columns.
inline void columns_of(const float* from, ptrdiff_t stride, int n, int words, float* to) {
  for (int row = 0; row < n; row += LANES)
    for (int w = 0; w < words; w += LANES)
      transpose(from + row * stride + w, stride, to + w * TILE + row, TILE);
}

// Zeros for the first n (a multiple of LANES) columns of (words, TILE). Not row by row, in which
// GCC would see so many calls of memset.
inline void clear_columns(float* to, int words, int n) {
  for (int at = 0; at < n; at += LANES)
    for (int w = 0; w < words; ++w) store(to + w * TILE + at, zero());
}

inline void flip_signs(float* words, int n, uint32_t signs) {
  for (int k = 0; k < n; ++k) {
    uint32_t bits;
    __builtin_memcpy(&bits, words + k, 4);
    bits ^= signs;
    __builtin_memcpy(words + k, &bits, 4);
  }
}

// A tile of queries, or of their gradients, for sums over D: (words, TILE). Queries are filled up
// with zeros to a multiple of LANES.
template <class Math>
void pack_columns(DType dtype, const char* from, ptrdiff_t from_stride, int n, int dim, float* rows,
                  float* to) {
  const int words = rounded_up(Pack<Math>::words(dim), LANES), filled = rounded_up(n, LANES);
  int done = 0;
  if (Pack<Math>::laid_out(dtype, dim) && from_stride % 4 == 0) {
    done = n / LANES * LANES;
    columns_of(reinterpret_cast<const float*>(from), from_stride / 4, done, words, to);
  }
  if (done == filled) return;
  const int left = n - done;
  Pack<Math>::rows(dtype, from + done * from_stride, from_stride, left, dim, rows, words);
  __builtin_memset(rows + left * words, 0, sizeof(float) * (filled - n) * words);
  columns_of(rows, words, filled - done, words, to + done);
}

// The opposite: n rows of a tensor from the columns of sums, (D, TILE), times factor(row).
template <class Factor>
void store_columns(const float* from, Factor&& factor, int n, int dim, float* rows, DType dtype,
                   char* to, ptrdiff_t to_stride) {
  const int stride = rounded_up(dim, LANES);
  for (int row = 0; row < n; row += LANES)
    for (int d = 0; d < dim; d += LANES)
      transpose(from + d * TILE + row, TILE, rows + row * stride + d, stride);
  for (int row = 0; row < n; ++row)
    from_floats(dtype, rows + row * stride, factor(row), dim, to + row * to_stride);
}

}  // namespace
}  // namespace fusedformer
