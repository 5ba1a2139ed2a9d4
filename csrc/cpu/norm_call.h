// Calls of dropout + add + layer norm: dropout_add_layer_norm_fwd and _bwd, and norm_plain*, by the
// shortest way. For entry points only.
#pragma once

#include <cmath>
#include <tuple>

#include "layer_norm.h"
#include "row_sums.h"
#include "tensors.h"

namespace fusedformer {
namespace {

using OptionalTensor = std::optional<Tensor>;

// --- Forward -------------------------------------------------------------------------------------

// A norm's inputs; holds the copies that it makes.
struct Norm {
  Norm(const Tensor& x_, const OptionalTensor& residual_, const OptionalTensor& weight_,
       const OptionalTensor& bias_, const Dropout& dropout_)
      : width(width_of(x_)), rows(x_.numel() / width), x(rows_of(x_, width)),
        residual(rows_of(residual_, width)), weight(weight_, width, 1.0f),
        bias(bias_, width, 0.0f), dropout(dropout_) {}

  // Into y, and z where that is wanted; mean is missing for RMS norm. Both (rows,).
  void forward(const Tensor& y, const OptionalTensor& z, ScalarType z_dtype, float* mean,
               float* rstd, double eps) const {
    NormForward a{};
    a.x = x.matrix;
    a.residual = matrix_of(residual);
    a.y = output(y, width);
    a.z = output(z, width);
    a.z_type = type_of(z_dtype);
    a.weight = weight.data();
    a.bias = bias.data();
    a.mean = mean;
    a.rstd = rstd;
    a.width = width;
    a.dropout = dropout;
    a.eps = static_cast<float>(eps);
    a.stream = past_caches(rows, width, {a.y, a.z});
    const NormKernels& kernels = FUSEDFORMER_PICK(norm_kernels);
    torch::stable::parallel_for(
        0, rows, divided_up(kGrain, width), [&](int64_t first, int64_t last) {
          const Scratch<float> row(2 * norm_pitch(width));
          const Scratch<uint32_t> words(mask_room(divided_up(width, kMaskBits)));
          kernels.forward(a, first, last, row.data(), words.data());
        });
  }

  const int64_t width, rows;
  const Rows x;
  const std::optional<Rows> residual;
  const FloatVector weight, bias;
  const Dropout dropout;
};

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

std::tuple<Tensor, OptionalTensor, OptionalTensor, Tensor> dropout_add_layer_norm_fwd(
    Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor seed, int64_t threshold, double scale, double eps, bool is_rms_norm,
    bool prenorm, ScalarType z_dtype) {
  const Norm norm(x, residual, weight, bias, dropout_of(seed, threshold, scale));
  const std::vector<int64_t> sizes = sizes_of(x), stats(sizes.begin(), sizes.end() - 1);
  const Tensor y = new_tensor(sizes, x.scalar_type());
  const Tensor rstd = new_tensor(stats, ScalarType::Float);
  OptionalTensor z, mean;
  if (prenorm) z = new_tensor(sizes, z_dtype);
  if (!is_rms_norm) mean = new_tensor(stats, ScalarType::Float);
  norm.forward(y, z, z_dtype, mean ? floats(*mean) : nullptr, floats(rstd), eps);
  return {y, z, mean, rstd};
}

// --- Backward ------------------------------------------------------------------------------------

struct NormGrads {
  Tensor x;
  OptionalTensor residual, weight, bias;
};

// Those of residual, weight and bias where wanted; source is z with prenorm, else x.
NormGrads norm_backward(const Tensor& grad_y, const OptionalTensor& grad_z, const Tensor& source,
                        const OptionalTensor& residual, const OptionalTensor& weight,
                        const OptionalTensor& bias, const Dropout& dropout, const float* mean,
                        const float* rstd, bool prenorm, ScalarType z_dtype, bool residual_grad,
                        bool weight_grad, bool bias_grad) {
  const int64_t width = width_of(source), rows = source.numel() / width;
  const std::vector<int64_t> sizes = sizes_of(source);
  const Rows source_rows = rows_of(source, width), grad_y_rows = rows_of(grad_y, width);
  const std::optional<Rows> residual_rows = rows_of(residual, width);
  const std::optional<Rows> grad_z_rows = rows_of(grad_z, width);
  const FloatVector weights(weight, width, 1.0f);
  NormGrads grads{new_tensor(sizes, grad_y.scalar_type()), {}, {}, {}};
  if (residual_grad) grads.residual = new_tensor(sizes, z_dtype);
  if (weight && weight_grad) grads.weight = new_tensor({width}, weight->scalar_type());
  if (bias && bias_grad) grads.bias = new_tensor({width}, bias->scalar_type());

  NormBackward a{};
  a.source = source_rows.matrix;
  a.residual = matrix_of(residual_rows);
  a.grad_y = grad_y_rows.matrix;
  a.grad_z = matrix_of(grad_z_rows);
  a.grad_x = output(grads.x, width);
  a.grad_residual = output(grads.residual, width);
  a.z_type = type_of(z_dtype);
  a.prenorm = prenorm;
  a.weight = weights.data();
  a.mean = mean;
  a.rstd = rstd;
  a.width = width;
  a.dropout = dropout;
  a.stream = past_caches(rows, width, {a.grad_x, a.grad_residual});
  const int64_t chunk = rows_of_chunk(rows, width), chunks = divided_up(rows, chunk);
  const NormKernels& kernels = FUSEDFORMER_PICK(norm_kernels);
  // Of the weight, then of the bias; none where neither is wanted.
  const int64_t pitch = grads.weight || grads.bias ? 2 * width : 0;
  const Scratch<float> sums(chunks * pitch);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> row(width), block(pitch);
    const Scratch<uint32_t> words(mask_room(divided_up(width, kMaskBits)));
    for (int64_t n = begin; n < end; ++n)
      sum_blocks(n * chunk, std::min(rows, (n + 1) * chunk), pitch, sums.data() + n * pitch,
                 block.data(), [&](int64_t first, int64_t last, float* into) {
                   kernels.backward(a, first, last, row.data(), words.data(),
                                    grads.weight ? into : nullptr,
                                    grads.bias ? into + width : nullptr);
                 });
  });
  if (pitch) add_up(sums.data(), chunks, pitch, width, grads.weight, grads.bias);
  return grads;
}

std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor> dropout_add_layer_norm_bwd(
    Tensor grad_y, OptionalTensor grad_z, Tensor source, OptionalTensor residual,
    OptionalTensor weight, OptionalTensor bias, OptionalTensor seed, OptionalTensor mean,
    Tensor rstd, int64_t threshold, double scale, bool prenorm, ScalarType z_dtype,
    bool residual_grad, bool weight_grad, bool bias_grad) {
  const int64_t rows = rstd.numel();
  const FloatVector means(mean, rows, 0.0f), rstds(rstd, rows, 0.0f);
  const NormGrads grads =
      norm_backward(grad_y, grad_z, source, residual, weight, bias,
                    dropout_of(seed, threshold, scale), mean ? means.data() : nullptr,
                    rstds.data(), prenorm, z_dtype, residual_grad, weight_grad, bias_grad);
  return {grads.x, grads.residual, grads.weight, grads.bias};
}

// --- The shortest way ----------------------------------------------------------------------------
//
// Where z is not asked for. What a usual call needs is checked here, for small ones in less time
// than anywhere else; nothing comes back where the call is not usual. Statistics are one tensor:
// rstd of all rows, then their mean, unless it is an RMS norm.

bool usual(const OptionalTensor& vector, int64_t width) {
  return !vector ||
         (is_floating(vector->scalar_type()) && vector->dim() == 1 && vector->size(0) == width);
}

bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t dim = 0; dim < a.dim(); ++dim)
    if (a.size(dim) != b.size(dim)) return false;
  return true;
}

bool usual(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
           const OptionalTensor& bias, double eps) {
  if (x.dim() == 0 || x.numel() == 0 || !is_floating(x.scalar_type())) return false;
  if (residual && !(is_floating(residual->scalar_type()) && same_sizes(x, *residual))) return false;
  const int64_t width = width_of(x);
  return usual(weight, width) && usual(bias, width) && eps >= 0 && std::isfinite(eps);
}

ScalarType z_dtype_of(const Tensor& x, const OptionalTensor& residual) {
  return residual ? residual->scalar_type() : x.scalar_type();
}

Tensor plain_forward(const Norm& norm, const Tensor& x, const OptionalTensor& residual,
                     double eps, bool is_rms_norm, float* stats) {
  const Tensor y = new_tensor(sizes_of(x), x.scalar_type());
  norm.forward(y, std::nullopt, z_dtype_of(x, residual), is_rms_norm ? nullptr : stats + norm.rows,
               stats, eps);
  return y;
}

// y alone.
OptionalTensor norm_plain(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                          double eps, bool is_rms_norm, const OptionalTensor& residual,
                          const OptionalTensor& seed, int64_t threshold, double scale) {
  if (!usual(x, residual, weight, bias, eps)) return std::nullopt;
  const Norm norm(x, residual, weight, bias, dropout_of(seed, threshold, scale));
  const Scratch<float> stats(2 * norm.rows);
  return plain_forward(norm, x, residual, eps, is_rms_norm, stats.data());
}

// y and the statistics.
std::tuple<OptionalTensor, OptionalTensor> norm_plain_fwd(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
    bool is_rms_norm, const OptionalTensor& residual, const OptionalTensor& seed,
    int64_t threshold, double scale) {
  if (!usual(x, residual, weight, bias, eps)) return {std::nullopt, std::nullopt};
  const Norm norm(x, residual, weight, bias, dropout_of(seed, threshold, scale));
  const Tensor stats = new_tensor({is_rms_norm ? 1 : 2, norm.rows}, ScalarType::Float);
  return {plain_forward(norm, x, residual, eps, is_rms_norm, floats(stats)), stats};
}

// Of norm_plain_fwd, by whose word the call is usual.
std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor> norm_plain_bwd(
    const Tensor& grad_y, const Tensor& stats, bool residual_grad, bool weight_grad,
    bool bias_grad, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& seed, int64_t threshold, double scale) {
  const int64_t rows = stats.size(1);
  const FloatVector rstd_mean(stats, stats.numel(), 0.0f);
  const NormGrads grads = norm_backward(
      grad_y, std::nullopt, x, residual, weight, bias, dropout_of(seed, threshold, scale),
      stats.size(0) == 1 ? nullptr : rstd_mean.data() + rows, rstd_mean.data(), false,
      z_dtype_of(x, residual), residual_grad, weight_grad, bias_grad);
  return {grads.x, grads.residual, grads.weight, grads.bias};
}

}  // namespace
}  // namespace fusedformer
