// The kernels of dropout + add + layer norm, for one chunk of rows; kernels/layer_norm.py has the
// contract, kernels/reference.py the formulas.
#pragma once

#include "rows.h"

namespace fusedformer {

struct NormForward {
  Matrix x, residual, y, z;  // residual and z may be missing
  Type z_type;
  const float* weight;  // (width,)
  const float* bias;
  float* mean;  // (rows,), or missing: RMS norm
  float* rstd;  // (rows,)
  int64_t width;
  Dropout dropout;
  float eps;
  bool stream;  // y and z are too large to be found in a cache again
};

struct NormBackward {
  Matrix source, grad_y, grad_x;
  Matrix residual, grad_z, grad_residual;  // may be missing
  Type z_type;
  bool prenorm;  // source is z, else x
  const float* weight;
  const float* mean;
  const float* rstd;
  int64_t width;
  Dropout dropout;
  bool stream;
};

// Up to this width the forward has two rows at hand at a time: their z, the weight and the bias, in
// float32, are half of a 32 KB cache.
constexpr int64_t kNormTurns = 1024;
// From one row of the forward's buffer to the next: whole cache lines, and what a last vector
// writes beyond.
constexpr int64_t norm_pitch(int64_t width) { return (width + 31) / 16 * 16; }

struct NormKernels {
  // row: 2 norm_pitch(width) floats (backward: width); words: mask_room(calls).
  void (*forward)(const NormForward&, int64_t first, int64_t last, float* row, uint32_t* words);
  // weight_sums, bias_sums: (width,), of these rows; missing where not wanted.
  void (*backward)(const NormBackward&, int64_t first, int64_t last, float* row, uint32_t* words,
                   float* weight_sums, float* bias_sums);
};

FUSEDFORMER_TABLE(NormKernels, norm_kernels);

}  // namespace fusedformer
