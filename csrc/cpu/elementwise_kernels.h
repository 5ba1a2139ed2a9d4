// Dropout, and bias + activation + dropout, forward and backward.
#pragma once

#include "elementwise.h"

#include "row_mask.h"
#include "row_math.h"

namespace fusedformer {
namespace {

// body(column, Whole or Part) for every 16 columns.
template <class Body>
inline __attribute__((always_inline)) void each_16(int64_t from, int64_t until, Body body) {
  int64_t column = from;
  for (; column + kLanes <= until; column += kLanes) body(column, Whole{});
  if (column < until) body(column, Part{static_cast<int>(until - column)});
}

template <class T, class Act>
void forward(const Elementwise& a, const Tile& tile, uint32_t* words) {
  const Keep keep(a.dropout);
  Masks masks(a.dropout, a.tag, tile, words);
  for (int64_t row = tile.first; row < tile.last; ++row) {
    const T* x = row_of<T>(a.x, row);
    T* out = row_to<T>(a.out, row);
    const uint32_t* words_of_row = masks.of(row);
    each_16(tile.from, tile.until, [&](int64_t column, auto n) __attribute__((always_inline)) {
      Floats z = load(x + column, n);
      if (a.bias) z = z + load(a.bias + column, n);
      z = Act::value(z);
      if (words_of_row) z = keep(z, words_of_row + (column - tile.from) / 4);
      put(out + column, z, n, a.stream);
    });
  }
  if (a.stream) fence();
}

template <class T, class Act>
void backward(const Elementwise& a, const Tile& tile, uint32_t* words, float* sums) {
  const Keep keep(a.dropout);
  Masks masks(a.dropout, a.tag, tile, words);
  for (int64_t row = tile.first; row < tile.last; ++row) {
    const T* x = row_of<T>(a.x, row);
    const T* grad = row_of<T>(a.grad, row);
    T* out = row_to<T>(a.out, row);
    const uint32_t* words_of_row = masks.of(row);
    each_16(tile.from, tile.until, [&](int64_t column, auto n) __attribute__((always_inline)) {
      Floats z = load(x + column, n);
      if (a.bias) z = z + load(a.bias + column, n);
      Floats g = load(grad + column, n);
      if (words_of_row) g = keep(g, words_of_row + (column - tile.from) / 4);
      g = g * Act::slope(z);
      if (sums) {
        float* at = sums + column - tile.from;
        store(at, g + load(at, n), n);
      }
      put(out + column, g, n, a.stream);
    });
  }
  if (a.stream) fence();
}

// --- By dtype and activation ---------------------------------------------------------------------

template <class T>
void forward_of(const Elementwise& a, const Tile& tile, uint32_t* words) {
  switch (a.activation) {
    case Activation::none: return forward<T, Identity>(a, tile, words);
    case Activation::gelu: return forward<T, Gelu>(a, tile, words);
    case Activation::gelu_tanh: return forward<T, GeluTanh>(a, tile, words);
    case Activation::relu: return forward<T, Relu>(a, tile, words);
    case Activation::silu: return forward<T, Silu>(a, tile, words);
  }
}

template <class T>
void backward_of(const Elementwise& a, const Tile& tile, uint32_t* words, float* sums) {
  switch (a.activation) {
    case Activation::none: return;  // dropout's backward is its forward
    case Activation::gelu: return backward<T, Gelu>(a, tile, words, sums);
    case Activation::gelu_tanh: return backward<T, GeluTanh>(a, tile, words, sums);
    case Activation::relu: return backward<T, Relu>(a, tile, words, sums);
    case Activation::silu: return backward<T, Silu>(a, tile, words, sums);
  }
}

void forward_tile(const Elementwise& a, const Tile& tile, uint32_t* words) {
  by_dtype(
      a.x.type, FUSEDFORMER_OTHERS(elementwise_kernels),
      [&](auto element) { forward_of<decltype(element)>(a, tile, words); },
      [&](const auto& others) { others.forward(a, tile, words); });
}

void backward_tile(const Elementwise& a, const Tile& tile, uint32_t* words, float* sums) {
  by_dtype(
      a.x.type, FUSEDFORMER_OTHERS(elementwise_kernels),
      [&](auto element) { backward_of<decltype(element)>(a, tile, words, sums); },
      [&](const auto& others) { others.backward(a, tile, words, sums); });
}

}  // namespace

extern const ElementwiseKernels FUSEDFORMER_NAME(elementwise_kernels) = {forward_tile,
                                                                         backward_tile};

}  // namespace fusedformer
