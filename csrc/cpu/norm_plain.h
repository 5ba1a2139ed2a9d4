// A norm alone, without residual, dropout or gradients: what a small call needs and no more. For
// entry points only.
#pragma once

#include <cmath>

#include "layer_norm.h"
#include "tensors.h"

namespace fusedformer {
namespace {

// The forward of all rows; says itself whether its outputs go past the caches.
void run_norm(NormForward& a, int64_t rows) {
  const int64_t width = a.width;
  a.stream = past_caches(rows, width, {a.y, a.z});
  const NormKernels& kernels = FUSEDFORMER_PICK(norm_kernels);
  torch::stable::parallel_for(0, rows, divided_up(kGrain, width), [&](int64_t first, int64_t last) {
    const Scratch<float> row(2 * norm_pitch(width));
    const Scratch<uint32_t> words(mask_room(divided_up(width, kMaskBits)));
    kernels.forward(a, first, last, row.data(), words.data());
  });
}

// Whether it is a weight or bias that needs no word of Python's: one that is missing is.
bool usual(const std::optional<Tensor>& vector, int64_t width) {
  return !vector ||
         (is_floating(vector->scalar_type()) && vector->dim() == 1 && vector->size(0) == width);
}

// y alone, of a norm without a residual or dropout. As attention_plain: its arguments are checked
// here, and nothing comes back where they are not usual.
std::optional<Tensor> norm_plain(const Tensor& x, const std::optional<Tensor>& weight,
                                 const std::optional<Tensor>& bias, double eps, bool is_rms_norm) {
  const int64_t width = width_of(x), size = x.numel();
  if (x.dim() == 0 || size == 0 || !is_floating(x.scalar_type())) return std::nullopt;
  if (!usual(weight, width) || !usual(bias, width)) return std::nullopt;
  if (!(eps >= 0 && std::isfinite(eps))) return std::nullopt;
  const Rows x_rows = rows_of(x, width);
  const FloatVector weights(weight, width, 1.0f), biases(bias, width, 0.0f);
  const Scratch<float> stats(2 * size / width);
  const Tensor y = new_tensor(sizes_of(x), x.scalar_type());
  NormForward a{};
  a.x = x_rows.matrix;
  a.y = output(y, width);
  a.z_type = a.x.type;
  a.weight = weights.data();
  a.bias = biases.data();
  a.rstd = stats.data();
  a.mean = is_rms_norm ? nullptr : stats.data() + size / width;
  a.width = width;
  a.eps = static_cast<float>(eps);
  run_norm(a, size / width);
  return y;
}

}  // namespace
}  // namespace fusedformer
