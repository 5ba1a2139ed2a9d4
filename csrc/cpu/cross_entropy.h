// The kernels of cross-entropy, for a range of rows; kernels/reference.py has the formulas.
#pragma once

#include "rows.h"

namespace fusedformer {

struct CrossEntropy {
  Matrix logits, grad;  // grad in the backward alone; it may be the logits
  int64_t classes;
  const int64_t* target;  // either of these two
  const int32_t* target32;
  int64_t ignore_index;
  const float* weight;  // (classes,), or missing: all 1
  float weight_sum;
  float share, uniform;               // 1 - smoothing, smoothing / classes
  float *losses, *row_weights, *lse;  // (rows,); the backward reads lse
  const float* grad_losses;           // (rows,)
};

struct CrossEntropyKernels {
  void (*forward)(const CrossEntropy&, int64_t first, int64_t last);
  void (*backward)(const CrossEntropy&, int64_t first, int64_t last);
};

FUSEDFORMER_TABLE(CrossEntropyKernels, cross_entropy_kernels);

}  // namespace fusedformer
