// The kernels of dropout, and of bias + activation + dropout, for a tile of a matrix.
#pragma once

#include "rows.h"

namespace fusedformer {

enum class Activation : int64_t { none, gelu, gelu_tanh, relu, silu };  // in the order of native.py

struct Elementwise {
  Matrix x, grad, out;  // grad in the backward alone; out is then the gradient of x
  const float* bias;    // (width,), or missing
  Activation activation;
  uint32_t tag;
  Dropout dropout;
  bool stream;
};

struct ElementwiseKernels {
  // out = dropout(act(x + bias)); words: mask_room(calls of a tile's row).
  void (*forward)(const Elementwise&, const Tile&, uint32_t* words);
  // out = dropout(grad) act'(x + bias); its sums over the tile's rows are added to sums,
  // (columns of the tile,), unless that is missing.
  void (*backward)(const Elementwise&, const Tile&, uint32_t* words, float* sums);
};

FUSEDFORMER_TABLE(ElementwiseKernels, elementwise_kernels);

}  // namespace fusedformer
