// The kernel of a linear layer for few rows, y = x W^T + b, as decoding has them.
#pragma once

#include "rows.h"

namespace fusedformer {

struct Linear {
  Matrix x;          // (rows, width)
  Matrix weight;     // (columns, width)
  const void* bias;  // (columns,), or missing
  Matrix y;          // (rows, columns); all of one type
  int64_t rows, columns, width;
};

// Columns of y that are computed, and handed out to threads, together.
constexpr int64_t kLinearBlock = 16;

struct LinearKernels {
  // Columns first to last - 1; first is a multiple of kLinearBlock.
  void (*forward)(const Linear&, int64_t first, int64_t last);
};

FUSEDFORMER_TABLE(LinearKernels, linear_kernels);

}  // namespace fusedformer
