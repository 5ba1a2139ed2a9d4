// The kernels of attention_decode.h.
#pragma once

#include "attention_decode.h"
#include "linear_kernels.h"
#include "row_math.h"

#include <float.h>

namespace fusedformer {
namespace {

// Weights times values for `rows` heads of queries and `vectors` vectors of D, the last one of them
// partly: out[row][d] = sum over keys of weights[row][key] v[key][d].
template <int rows, int vectors, class T, class N>
inline __attribute__((always_inline)) void add_values(const float (*weights)[kPartKeys],
                                                      const T* v, int64_t stride, int64_t n,
                                                      float* out, int64_t pitch, N last) {
  Floats sums[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < vectors; ++c) sums[r][c] = splat(0.0f);
  for (int64_t key = 0; key < n; ++key) {
    const T* row = v + key * stride;
    Floats values[vectors];
#pragma GCC unroll 8
    for (int c = 0; c + 1 < vectors; ++c) values[c] = load(row + c * kLanes, Whole{});
    values[vectors - 1] = load(row + (vectors - 1) * kLanes, last);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Floats weight = splat(weights[r][key]);
#pragma GCC unroll 8
      for (int c = 0; c < vectors; ++c) sums[r][c] = fma(weight, values[c], sums[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c + 1 < vectors; ++c) store(out + r * pitch + c * kLanes, sums[r][c], Whole{});
    store(out + r * pitch + (vectors - 1) * kLanes, sums[r][vectors - 1], last);
  }
}

// The same for all of D.
template <int rows, class T>
void add_all_values(const float (*weights)[kPartKeys], const T* v, int64_t stride, int64_t n,
                    int64_t dim, float* out, int64_t pitch) {
  constexpr int kVectors = kSums / kRows, kColumns = kVectors * kLanes;
  int64_t d = 0;
  for (; d + kColumns <= dim; d += kColumns)
    add_values<rows, kVectors>(weights, v + d, stride, n, out + d, pitch, Whole{});
  for (; d < dim; d += kLanes) {
    const Part part{static_cast<int>(dim - d < kLanes ? dim - d : kLanes)};
    add_values<rows, 1>(weights, v + d, stride, n, out + d, pitch, part);
  }
}

template <int rows = kRows, class T>
void values_of(int64_t count, const float (*weights)[kPartKeys], const T* v, int64_t stride,
               int64_t n, int64_t dim, float* out, int64_t pitch) {
  if (count == rows)
    add_all_values<rows>(weights, v, stride, n, dim, out, pitch);
  else if constexpr (rows > 1)
    values_of<rows - 1>(count, weights, v, stride, n, dim, out, pitch);
}

// Scores to their exponentials about the largest; leaves that and their sum.
inline void exponentials(float* scores, int64_t n, float scale, float* out) {
  Floats most = splat(-FLT_MAX);  // finite: a score of -infinity counts for nothing
  for_columns<1>(n, [&](int64_t at, int, auto inside_of) __attribute__((always_inline)) {
    const Floats score = load(scores + at, inside_of) * splat(scale);
    store(scores + at, score, inside_of);
    most = max(most, inside(score, inside_of, -FLT_MAX));
  });
  out[0] = largest(most);
  const Floats top = splat(out[0]);
  Floats total = splat(0.0f);
  for_columns<1>(n, [&](int64_t at, int, auto inside_of) __attribute__((always_inline)) {
    const Floats weight = exp(load(scores + at, inside_of) - top);
    store(scores + at, weight, inside_of);
    total = total + inside(weight, inside_of);
  });
  out[1] = sum(total);
}

template <class T>
void part_of(const Attention& p, int64_t b, int64_t key_head, int64_t first, int64_t last,
             float* parts, int64_t pitch) {
  constexpr int64_t kSize = sizeof(T);
  const int64_t n = last - first, head = key_head * p.group();
  const T* values = reinterpret_cast<const T*>(p.value.at(b, key_head, first));
  Linear a{};
  a.x = {p.query.at(b, head, 0), p.query.head / kSize};
  a.weight = {p.key.at(b, key_head, first), p.key.row / kSize};
  a.width = p.dim;
  alignas(64) float scores[kMostRows][kPartKeys];
  for (int64_t row = 0; row < p.group(); row += kMostRows) {
    const int64_t count = p.group() - row < kMostRows ? p.group() - row : kMostRows;
    for (int64_t key = 0; key < n; key += kLinearBlock) {
      const int64_t keys = n - key < kLinearBlock ? n - key : kLinearBlock;
      float totals[kMostRows][kLinearBlock];
      block<T>(a, row, count, key, keys, totals);
      for (int64_t r = 0; r < count; ++r) memcpy(scores[r] + key, totals[r], keys * sizeof(float));
    }
    for (int64_t r = 0; r < count; ++r)
      exponentials(scores[r], n, p.scale, parts + (row + r) * pitch);
    for (int64_t r = 0; r < count; r += kRows)
      values_of(count - r < kRows ? count - r : kRows, scores + r, values, p.value.row / kSize, n,
                p.dim, parts + (row + r) * pitch + 2, pitch);
  }
}

void decode_part(const Attention& p, int64_t b, int64_t key_head, int64_t first, int64_t last,
                 float* parts, int64_t pitch) {
  const Type type = p.dtype == DType::float32    ? Type::float32
                    : p.dtype == DType::bfloat16 ? Type::bfloat16
                                                 : Type::float16;
  by_dtype(
      type, FUSEDFORMER_OTHERS(attention_decode_kernels),
      [&](auto element) { part_of<decltype(element)>(p, b, key_head, first, last, parts, pitch); },
      [&](const auto& others) { others.part(p, b, key_head, first, last, parts, pitch); });
}

template <class T>
void write_out(T* out, const float* sums, int64_t dim, float factor) {
  for_columns<1>(dim, [&](int64_t d, int, auto n) __attribute__((always_inline)) {
    store(out + d, load(sums + d, n) * splat(factor), n);
  });
}

void decode_merge(const Attention& p, int64_t b, int64_t h, float* parts, int64_t n) {
  const int64_t size = part_size(p.dim);
  float top = -FLT_MAX, sum = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float most = parts[i * size];
    top = most > top || most != most ? most : top;
  }
  float* out = parts + 2;  // of the first part, which the others are added to
  for (int64_t i = 0; i < n; ++i) {
    const float* part = parts + i * size;
    const float weight = expf(part[0] - top);
    sum += weight * part[1];
    for_columns<1>(p.dim, [&](int64_t d, int, auto inside) __attribute__((always_inline)) {
      const Floats before = i ? load(out + d, inside) : splat(0.0f);
      store(out + d, fma(splat(weight), load(part + 2 + d, inside), before), inside);
    });
  }
  // A query with nothing to attend to has O = 0 and LSE = -inf; out is zeros then, as it came.
  if (p.lse) p.lse[b * p.heads + h] = static_cast<float>(top + log(sum));
  const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  char* to = p.out.at(b, h, 0);
  switch (p.dtype) {
    case DType::float32: return write_out(reinterpret_cast<float*>(to), out, p.dim, factor);
    case DType::bfloat16: return write_out(reinterpret_cast<BFloat16*>(to), out, p.dim, factor);
    default: return write_out(reinterpret_cast<Half*>(to), out, p.dim, factor);
  }
}

}  // namespace

extern const AttentionDecodeKernels FUSEDFORMER_NAME(attention_decode_kernels) = {decode_part,
                                                                                  decode_merge};

}  // namespace fusedformer
