// Dropout + add + layer norm. A row is read from memory once and kept in a buffer of floats in the
// cache for the passes that follow: the mean, the variance about it, the result.
#pragma once

#include "layer_norm.h"

#include "row_mask.h"

namespace fusedformer {
namespace {

// z = residual + dropout(x) of 16 columns, as it is after rounding to its dtype.
template <class X, class Z, class N>
inline Floats made_z(const X* x, const Z* residual, const uint32_t* words, const Keep& keep,
                     int64_t column, N n) {
  Floats z = load(x + column, n);
  if (words) z = keep(z, words + column / 4);
  if (residual) z = z + load(residual + column, n);
  return as_stored(z, static_cast<Z*>(nullptr));
}

template <class X, class Z>
void forward(const NormForward& a, int64_t first, int64_t last, float* buffer, uint32_t* words) {
  const int64_t width = a.width;
  const float inverse_width = 1.0f / static_cast<float>(width);
  const float *weight = a.weight, *bias = a.bias;
  const bool past_caches = a.stream;
  const Keep keep(a.dropout);
  Masks masks(a.dropout, philox::kDropoutAddNorm, {first, last, 0, width}, words);

  // Where the buffers of two rows stay in the nearest cache, a row is finished between the passes
  // of the next one, so that nothing waits for a sum, a root or a quotient.
  const bool in_turns = width <= kNormTurns;
  float mean = 0.0f;
  const auto finish = [&](int64_t row, const float* z_row, float its_mean) {
    X* y = row_to<X>(a.y, row);
    const Floats centre = splat(its_mean), factor = splat(a.rstd[row]);
    for_columns<2>(width, [&](int64_t column, int u, auto n) __attribute__((always_inline)) {
      if (!past_caches) fetch<for_writing>(y + column, u);
      const Floats normed = (load(z_row + column, n) - centre) * factor;
      const Floats out = fma(normed, load(weight + column, n), load(bias + column, n));
      put(y + column, out, n, past_caches);
    });
  };
  for (int64_t row = first; row < last; ++row) {
    float* z_row = in_turns ? buffer + row % 2 * norm_pitch(width) : buffer;
    const float mean_before = mean;
    const X* x = row_of<X>(a.x, row);
    const Z* residual = a.residual.data ? row_of<Z>(a.residual, row) : nullptr;
    Z* z_out = a.z.data ? row_to<Z>(a.z, row) : nullptr;
    const uint32_t* random = masks.of(row);

    // The sum of squares is RMS norm's; layer norm's are those about the mean.
    Sums<2> sums, squares;
    for_columns<2>(width, [&](int64_t column, int u, auto n) __attribute__((always_inline)) {
      fetch(x + column, u);
      if (residual) fetch(residual + column, u);
      const Floats z = made_z(x, residual, random, keep, column, n);
      store(z_row + column, z, n);
      if (z_out) put(z_out + column, z, n, past_caches);
      const Floats addend = inside(z, n);
      sums.v[u] = sums.v[u] + addend;
      squares.v[u] = fma(addend, addend, squares.v[u]);
    });
    mean = a.mean ? sums.total() * inverse_width : 0.0f;
    if (in_turns && row > first)
      finish(row - 1, buffer + (row - 1) % 2 * norm_pitch(width), mean_before);
    float variance = squares.total() * inverse_width;
    if (a.mean) {
      if (!in_turns) masks.prepare(row + 1);
      const Floats centre = splat(mean);
      Sums<4> about_mean;
      for_columns<4>(width, [&](int64_t column, int u, auto n) __attribute__((always_inline)) {
        const Floats d = inside(load(z_row + column, n) - centre, n);
        about_mean.v[u] = fma(d, d, about_mean.v[u]);
      });
      variance = about_mean.total() * inverse_width;
      a.mean[row] = mean;
    }
    a.rstd[row] = 1.0f / sqrtf(variance + a.eps);
    if (!in_turns || row + 1 == last) finish(row, z_row, mean);
  }
  if (a.stream) fence();
}

template <class X, class Z>
void backward(const NormBackward& a, int64_t first, int64_t last, float* buffer, uint32_t* words,
              float* weight_sums, float* bias_sums) {
  const int64_t width = a.width;
  const float inverse_width = 1.0f / static_cast<float>(width);
  const float* weight = a.weight;
  const bool past_caches = a.stream, prenorm = a.prenorm;
  const Keep keep(a.dropout);
  Masks masks(a.dropout, philox::kDropoutAddNorm, {first, last, 0, width}, words);
  for (int64_t row = first; row < last; ++row) {
    const X* x = row_of<X>(a.source, row);
    const Z* z_in = row_of<Z>(a.source, row);
    const Z* residual = a.residual.data ? row_of<Z>(a.residual, row) : nullptr;
    const X* grad_y = row_of<X>(a.grad_y, row);
    const Z* grad_z = a.grad_z.data ? row_of<Z>(a.grad_z, row) : nullptr;
    X* grad_x = row_to<X>(a.grad_x, row);
    Z* grad_residual = a.grad_residual.data ? row_to<Z>(a.grad_residual, row) : nullptr;
    const uint32_t* random = masks.of(row);
    const Floats centre = splat(a.mean ? a.mean[row] : 0.0f), rstd = splat(a.rstd[row]);

    Sums<2> sums, products;
    for_columns<2>(width, [&](int64_t column, int u, auto n) __attribute__((always_inline)) {
      fetch(grad_y + column, u);
      Floats z;
      if (prenorm) {
        fetch(z_in + column, u);
        z = load(z_in + column, n);
      } else {
        fetch(x + column, u);
        if (residual) fetch(residual + column, u);
        z = made_z(x, residual, random, keep, column, n);
      }
      const Floats normed = inside((z - centre) * rstd, n);
      store(buffer + column, normed, n);
      const Floats upstream = load(grad_y + column, n);
      if (weight_sums) {
        float* at = weight_sums + column;
        store(at, fma(upstream, normed, load(at, n)), n);
      }
      if (bias_sums) {
        float* at = bias_sums + column;
        store(at, upstream + load(at, n), n);
      }
      const Floats grad = upstream * load(weight + column, n);
      sums.v[u] = sums.v[u] + grad;
      products.v[u] = fma(grad, normed, products.v[u]);
    });
    masks.prepare(row + 1);
    const Floats along = splat(products.total() * inverse_width);
    const Floats shift = splat(a.mean ? sums.total() * inverse_width : 0.0f);
    for_columns<2>(width, [&](int64_t column, int u, auto n) __attribute__((always_inline)) {
      if (!past_caches) {
        fetch<for_writing>(grad_x + column, u);
        if (grad_residual) fetch<for_writing>(grad_residual + column, u);
      }
      const Floats upstream = load(grad_y + column, n) * load(weight + column, n);
      Floats grad = fnma(load(buffer + column, n), along, upstream - shift) * rstd;
      if (grad_z) grad = grad + load(grad_z + column, n);
      if (grad_residual) put(grad_residual + column, grad, n, past_caches);
      if (random) grad = keep(grad, random + column / 4);
      put(grad_x + column, grad, n, past_caches);
    });
  }
  if (a.stream) fence();
}

// --- By dtype ------------------------------------------------------------------------------------

template <class X, class... Args>
void forward_of(Type z, const Args&... args) {
  if (z == Type::float32)
    forward<X, float>(args...);
  else if (z == Type::float16)
    forward<X, Half>(args...);
  else
    forward<X, BFloat16>(args...);
}

template <class X, class... Args>
void backward_of(Type z, const Args&... args) {
  if (z == Type::float32)
    backward<X, float>(args...);
  else if (z == Type::float16)
    backward<X, Half>(args...);
  else
    backward<X, BFloat16>(args...);
}

// A float32 x beside a bfloat16 residual is the one other case that bfloat16 instructions serve.
#ifdef __AVX512BF16__
constexpr bool kBfloat16Residual = true;
#else
constexpr bool kBfloat16Residual = false;
#endif

void forward_rows(const NormForward& a, int64_t first, int64_t last, float* row, uint32_t* words) {
  if (kBfloat16Residual && a.x.type == Type::float32 && a.z_type == Type::bfloat16)
    return forward<float, BFloat16>(a, first, last, row, words);
  by_dtype(
      a.x.type, FUSEDFORMER_OTHERS(norm_kernels),
      [&](auto x) { forward_of<decltype(x)>(a.z_type, a, first, last, row, words); },
      [&](const auto& others) { others.forward(a, first, last, row, words); });
}

void backward_rows(const NormBackward& a, int64_t first, int64_t last, float* row, uint32_t* words,
                   float* weight_sums, float* bias_sums) {
  if (kBfloat16Residual && a.grad_y.type == Type::float32 && a.z_type == Type::bfloat16)
    return backward<float, BFloat16>(a, first, last, row, words, weight_sums, bias_sums);
  by_dtype(
      a.grad_y.type, FUSEDFORMER_OTHERS(norm_kernels),
      [&](auto x) {
        backward_of<decltype(x)>(a.z_type, a, first, last, row, words, weight_sums, bias_sums);
      },
      [&](const auto& others) {
        others.backward(a, first, last, row, words, weight_sums, bias_sums);
      });
}

}  // namespace

extern const NormKernels FUSEDFORMER_NAME(norm_kernels) = {forward_rows, backward_rows};

}  // namespace fusedformer
