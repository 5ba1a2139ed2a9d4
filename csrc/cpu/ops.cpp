// Entry points of the row-wise ops: torch.ops.fusedformer_native.<op>_fwd and <op>_bwd.
//
// Conventions of csrc/cpu, for every op:
//
// - An entry point takes tensors of the LibTorch stable ABI, allocates what it returns, cuts the
//   work into tasks for torch::stable::parallel_for and calls kernels on plain pointers. It trusts
//   what kernels/<op>.py checked. The public schemas are Python's, in the namespace fusedformer;
//   this one is private, so that no schema has two owners.
// - Kernels lie in *_kernels.cpp, which isa.h explains: compiled once for each instruction set,
//   no C++ library, no torch. New files are compiled by being there (kernels/native_build.py).
// - The cut into tasks depends on sizes alone, never on the number of threads, and what several
//   tasks add up is added in a fixed order: any number of threads gives the same bits.
// - Only functions of TORCH_TARGET_VERSION 2.10 are used, so that one build runs on every torch
//   from 2.10 on. No OpenMP of our own: torch's thread pool alone.
#include <algorithm>
#include <numeric>
#include <tuple>

#include "../philox.h"
#include "cross_entropy.h"
#include "elementwise.h"
#include "layer_norm.h"
#include "norm_plain.h"
#include "tensors.h"

namespace fusedformer {
namespace {

using OptionalTensor = std::optional<Tensor>;

// --- Sums over rows ------------------------------------------------------------------------------
//
// Gradients of a weight or bias are summed over fixed chunks of rows, each in float32 by one task,
// and these sums in the order of the chunks: whatever the number of threads, the same additions.

// 64 chunks keep 64 threads busy and cost a sixty-fourth of the data in traffic; a chunk of fewer
// elements than the grain would cost more than it saves.
int64_t rows_of_chunk(int64_t rows, int64_t width) {
  return std::max(divided_up(rows, 64), divided_up(kGrain / 2, width));
}

// Of a chunk, so many rows are summed one by one, and these sums then: 32 is few enough for a
// float32 sum to stay as exact as eager's, which is pairwise, and enough to cost little.
constexpr int64_t kBlockRows = 32;

// to += from, four at a time by itself: this file is compiled with few optimisations.
void add(float* to, const float* from, int64_t n) {
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    *reinterpret_cast<Four*>(to + i) += *reinterpret_cast<const Four*>(from + i);
  for (; i < n; ++i) to[i] += from[i];
}

// total = the sums of run(first row, last row, sums that it adds to); block is scratch.
template <class Run>
void sum_blocks(int64_t first, int64_t last, int64_t columns, float* total, float* block,
                const Run& run) {
  std::fill_n(total, columns, 0.0f);
  for (int64_t row = first; row < last; row += kBlockRows) {
    std::fill_n(block, columns, 0.0f);
    run(row, std::min(last, row + kBlockRows), block);
    add(total, block, columns);
  }
}

// The sums of all chunks, pitch apart, into a gradient.
void add_up(const Tensor& grad, const float* sums, int64_t chunks, int64_t width, int64_t pitch) {
  torch::stable::parallel_for(0, width, std::max<int64_t>(kGrain / chunks, 16),
                              [&](int64_t first, int64_t last) {
                                std::vector<float> total(sums + first, sums + last);
                                for (int64_t chunk = 1; chunk < chunks; ++chunk)
                                  add(total.data(), sums + chunk * pitch + first, last - first);
                                write(grad, total.data(), first, last);
                              });
}

// --- Dropout + add + layer norm ------------------------------------------------------------------

std::tuple<Tensor, OptionalTensor, OptionalTensor, Tensor> dropout_add_layer_norm_fwd(
    Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor seed, int64_t threshold, double scale, double eps, bool is_rms_norm,
    bool prenorm, ScalarType z_dtype) {
  const int64_t width = width_of(x), rows = x.numel() / width;
  const std::vector<int64_t> sizes = sizes_of(x), stats(sizes.begin(), sizes.end() - 1);
  const Rows x_rows = rows_of(x, width);
  const std::optional<Rows> residual_rows = rows_of(residual, width);
  const FloatVector weights(weight, width, 1.0f), biases(bias, width, 0.0f);
  const Tensor y = new_tensor(sizes, x.scalar_type());
  const Tensor rstd = new_tensor(stats, ScalarType::Float);
  OptionalTensor z, mean;
  if (prenorm) z = new_tensor(sizes, z_dtype);
  if (!is_rms_norm) mean = new_tensor(stats, ScalarType::Float);

  NormForward a{};
  a.x = x_rows.matrix;
  a.residual = matrix_of(residual_rows);
  a.y = output(y, width);
  a.z = output(z, width);
  a.z_type = type_of(z_dtype);
  a.weight = weights.data();
  a.bias = biases.data();
  a.mean = mean ? static_cast<float*>(mean->mutable_data_ptr()) : nullptr;
  a.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  a.width = width;
  a.dropout = dropout_of(seed, threshold, scale);
  a.eps = static_cast<float>(eps);
  run_norm(a, rows);
  return {y, z, mean, rstd};
}

std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor> dropout_add_layer_norm_bwd(
    Tensor grad_y, OptionalTensor grad_z, Tensor source, OptionalTensor residual,
    OptionalTensor weight, OptionalTensor bias, OptionalTensor seed, OptionalTensor mean,
    Tensor rstd, int64_t threshold, double scale, bool prenorm, ScalarType z_dtype,
    bool residual_grad, bool weight_grad, bool bias_grad) {
  const int64_t width = width_of(source), rows = source.numel() / width;
  const std::vector<int64_t> sizes = sizes_of(source);
  const Rows source_rows = rows_of(source, width), grad_y_rows = rows_of(grad_y, width);
  const std::optional<Rows> residual_rows = rows_of(residual, width);
  const std::optional<Rows> grad_z_rows = rows_of(grad_z, width);
  const FloatVector weights(weight, width, 1.0f);
  const FloatVector means(mean, rows, 0.0f), rstds(rstd, rows, 0.0f);
  const Tensor grad_x = new_tensor(sizes, grad_y.scalar_type());
  OptionalTensor grad_residual, grad_weight, grad_bias;
  if (residual_grad) grad_residual = new_tensor(sizes, z_dtype);
  if (weight && weight_grad) grad_weight = new_tensor({width}, weight->scalar_type());
  if (bias && bias_grad) grad_bias = new_tensor({width}, bias->scalar_type());

  NormBackward a{};
  a.source = source_rows.matrix;
  a.residual = matrix_of(residual_rows);
  a.grad_y = grad_y_rows.matrix;
  a.grad_z = matrix_of(grad_z_rows);
  a.grad_x = output(grad_x, width);
  a.grad_residual = output(grad_residual, width);
  a.z_type = type_of(z_dtype);
  a.prenorm = prenorm;
  a.weight = weights.data();
  a.mean = mean ? means.data() : nullptr;
  a.rstd = rstds.data();
  a.width = width;
  a.dropout = dropout_of(seed, threshold, scale);
  a.stream = past_caches(rows, width, {a.grad_x, a.grad_residual});
  const int64_t chunk = rows_of_chunk(rows, width), chunks = divided_up(rows, chunk);
  const NormKernels& kernels = FUSEDFORMER_PICK(norm_kernels);
  // Of the weight, then of the bias; none where neither is wanted.
  const int64_t pitch = grad_weight || grad_bias ? 2 * width : 0;
  const Scratch<float> sums(chunks * pitch);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> row(width), block(pitch);
    const Scratch<uint32_t> words(mask_room(divided_up(width, kMaskBits)));
    for (int64_t n = begin; n < end; ++n)
      sum_blocks(n * chunk, std::min(rows, (n + 1) * chunk), pitch, sums.data() + n * pitch,
                 block.data(), [&](int64_t first, int64_t last, float* into) {
                   kernels.backward(a, first, last, row.data(), words.data(),
                                    grad_weight ? into : nullptr,
                                    grad_bias ? into + width : nullptr);
                 });
  });
  if (grad_weight) add_up(*grad_weight, sums.data(), chunks, width, pitch);
  if (grad_bias) add_up(*grad_bias, sums.data() + width, chunks, width, pitch);
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

// --- Dropout; bias + activation + dropout --------------------------------------------------------

// Columns of a tile: a few long rows are cut lengthwise, too.
constexpr int64_t kTileColumns = 4096;

Tile tile_of(int64_t task, int64_t row_chunk, int64_t rows, int64_t width) {
  const int64_t across = divided_up(width, kTileColumns);
  const int64_t first = task / across * row_chunk, from = task % across * kTileColumns;
  return {first, std::min(rows, first + row_chunk), from, std::min(width, from + kTileColumns)};
}

Tensor elementwise_forward(const Tensor& x, const OptionalTensor& bias, uint32_t tag,
                           Activation activation, const Dropout& dropout) {
  const int64_t width = width_of(x), rows = x.numel() / width;
  const Rows x_rows = rows_of(x, width);
  const Tensor out = new_tensor(sizes_of(x), x.scalar_type());
  std::optional<FloatVector> biases;
  if (bias) biases.emplace(bias, width, 0.0f);

  Elementwise a{};
  a.x = x_rows.matrix;
  a.out = output(out, width);
  a.bias = biases ? biases->data() : nullptr;
  a.activation = activation;
  a.tag = tag;
  a.dropout = dropout;
  a.stream = past_caches(rows, width, {a.out});
  const int64_t columns = std::min(width, kTileColumns);
  const int64_t row_chunk = divided_up(kGrain / 4, columns);
  const int64_t tasks = divided_up(rows, row_chunk) * divided_up(width, kTileColumns);
  const ElementwiseKernels& kernels = FUSEDFORMER_PICK(elementwise_kernels);
  torch::stable::parallel_for(0, tasks, 4, [&](int64_t begin, int64_t end) {
    uint32_t words[mask_room(kTileColumns / kMaskBits)];
    for (int64_t task = begin; task < end; ++task)
      kernels.forward(a, tile_of(task, row_chunk, rows, width), words);
  });
  return out;
}

Tensor dropout_fwd(Tensor x, Tensor seed, int64_t threshold, double scale) {
  return elementwise_forward(x, std::nullopt, philox::kDropout, Activation::none,
                             dropout_of(seed, threshold, scale));
}

Tensor bias_activation_fwd(Tensor x, OptionalTensor bias, OptionalTensor seed, int64_t activation,
                           int64_t threshold, double scale) {
  return elementwise_forward(x, bias, philox::kBiasActivation, static_cast<Activation>(activation),
                             dropout_of(seed, threshold, scale));
}

std::tuple<Tensor, OptionalTensor> bias_activation_bwd(Tensor grad_out, Tensor x,
                                                       OptionalTensor bias, OptionalTensor seed,
                                                       int64_t activation, int64_t threshold,
                                                       double scale, bool bias_grad) {
  const int64_t width = width_of(x), rows = x.numel() / width;
  const Rows x_rows = rows_of(x, width), grad_rows = rows_of(grad_out, width);
  const Tensor grad_x = new_tensor(sizes_of(x), x.scalar_type());
  OptionalTensor grad_bias;
  if (bias && bias_grad) grad_bias = new_tensor({width}, bias->scalar_type());
  std::optional<FloatVector> biases;
  if (bias) biases.emplace(bias, width, 0.0f);

  Elementwise a{};
  a.x = x_rows.matrix;
  a.grad = grad_rows.matrix;
  a.out = output(grad_x, width);
  a.bias = biases ? biases->data() : nullptr;
  a.activation = static_cast<Activation>(activation);
  a.tag = philox::kBiasActivation;
  a.dropout = dropout_of(seed, threshold, scale);
  a.stream = past_caches(rows, width, {a.out});
  const int64_t columns = std::min(width, kTileColumns), across = divided_up(width, kTileColumns);
  const int64_t row_chunk = rows_of_chunk(rows, columns), chunks = divided_up(rows, row_chunk);
  const Scratch<float> sums(grad_bias ? chunks * width : 0);
  const ElementwiseKernels& kernels = FUSEDFORMER_PICK(elementwise_kernels);
  torch::stable::parallel_for(0, chunks * across, 1, [&](int64_t begin, int64_t end) {
    uint32_t words[mask_room(kTileColumns / kMaskBits)];
    const Scratch<float> block(columns);
    for (int64_t task = begin; task < end; ++task) {
      const Tile tile = tile_of(task, row_chunk, rows, width);
      if (!grad_bias) {
        kernels.backward(a, tile, words, nullptr);
        continue;
      }
      sum_blocks(tile.first, tile.last, tile.until - tile.from,
                 sums.data() + task / across * width + tile.from, block.data(),
                 [&](int64_t first, int64_t last, float* into) {
                   kernels.backward(a, {first, last, tile.from, tile.until}, words, into);
                 });
    }
  });
  if (grad_bias) add_up(*grad_bias, sums.data(), chunks, width, width);
  return {grad_x, grad_bias};
}

// --- Cross-entropy -------------------------------------------------------------------------------

struct Targets {
  explicit Targets(const Tensor& tensor)
      : kept(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor)) {}
  void set(CrossEntropy& a) const {
    const void* data = kept.const_data_ptr();
    if (kept.scalar_type() == ScalarType::Long)
      a.target = static_cast<const int64_t*>(data);
    else
      a.target32 = static_cast<const int32_t*>(data);
  }
  Tensor kept;
};

CrossEntropy options(int64_t classes, const std::optional<FloatVector>& weights,
                     int64_t ignore_index, double smoothing) {
  CrossEntropy a{};
  a.classes = classes;
  a.weight = weights ? weights->data() : nullptr;
  double sum = static_cast<double>(classes);
  if (a.weight && smoothing > 0) sum = std::accumulate(a.weight, a.weight + classes, 0.0);
  a.weight_sum = static_cast<float>(sum);
  a.ignore_index = ignore_index;
  a.share = static_cast<float>(1 - smoothing);
  a.uniform = static_cast<float>(smoothing / static_cast<double>(classes));
  return a;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_fwd(Tensor logits, Tensor target,
                                                     OptionalTensor weight, int64_t ignore_index,
                                                     double smoothing) {
  const int64_t classes = width_of(logits), rows = logits.numel() / classes;
  const Rows logit_rows = rows_of(logits, classes);
  const Targets targets(target);
  std::optional<FloatVector> weights;
  if (weight) weights.emplace(weight, classes, 1.0f);
  const std::vector<int64_t> sizes = sizes_of(target);
  const Tensor losses = new_tensor(sizes, ScalarType::Float);
  const Tensor row_weights = new_tensor(sizes, ScalarType::Float);
  const Tensor lse = new_tensor(sizes, ScalarType::Float);

  CrossEntropy a = options(classes, weights, ignore_index, smoothing);
  a.logits = logit_rows.matrix;
  targets.set(a);
  a.losses = static_cast<float*>(losses.mutable_data_ptr());
  a.row_weights = static_cast<float*>(row_weights.mutable_data_ptr());
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  const CrossEntropyKernels& kernels = FUSEDFORMER_PICK(cross_entropy_kernels);
  torch::stable::parallel_for(
      0, rows, divided_up(kGrain / 4, classes),
      [&](int64_t first, int64_t last) { kernels.forward(a, first, last); });
  return {losses, row_weights, lse};
}

// Into grad, which may be the logits themselves.
void cross_entropy_bwd(Tensor grad_losses, Tensor lse, Tensor logits, Tensor target,
                       OptionalTensor weight, int64_t ignore_index, double smoothing, Tensor grad) {
  const int64_t classes = width_of(logits), rows = logits.numel() / classes;
  const Rows logit_rows = rows_of(logits, classes);
  const std::optional<int64_t> grad_stride = row_stride(grad, classes);
  STD_TORCH_CHECK(grad_stride, "cross_entropy: the gradient's rows must be evenly spaced");
  const Targets targets(target);
  std::optional<FloatVector> weights;
  if (weight) weights.emplace(weight, classes, 1.0f);
  const FloatVector lses(lse, rows, 0.0f), upstream(grad_losses, rows, 0.0f);

  CrossEntropy a = options(classes, weights, ignore_index, smoothing);
  a.logits = logit_rows.matrix;
  a.grad = {grad.mutable_data_ptr(), *grad_stride, type_of(grad.scalar_type())};
  targets.set(a);
  a.lse = const_cast<float*>(lses.data());
  a.grad_losses = upstream.data();
  const CrossEntropyKernels& kernels = FUSEDFORMER_PICK(cross_entropy_kernels);
  torch::stable::parallel_for(
      0, rows, divided_up(kGrain / 4, classes),
      [&](int64_t first, int64_t last) { kernels.backward(a, first, last); });
}

}  // namespace
}  // namespace fusedformer

STABLE_TORCH_LIBRARY_FRAGMENT(fusedformer_native, m) {
  m.def("dropout_fwd(Tensor x, Tensor seed, int threshold, float scale) -> Tensor");
  m.def(
      "dropout_add_layer_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
      "Tensor? seed, int threshold, float scale, float eps, bool is_rms_norm, bool prenorm, "
      "ScalarType z_dtype) -> (Tensor, Tensor?, Tensor?, Tensor)");
  m.def(
      "norm_plain(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-5, "
      "bool is_rms_norm=False) -> Tensor?");
  m.def(
      "dropout_add_layer_norm_bwd(Tensor grad_y, Tensor? grad_z, Tensor source, Tensor? residual, "
      "Tensor? weight, Tensor? bias, Tensor? seed, Tensor? mean, Tensor rstd, int threshold, "
      "float scale, bool prenorm, ScalarType z_dtype, bool residual_grad, bool weight_grad, "
      "bool bias_grad) -> (Tensor, Tensor?, Tensor?, Tensor?)");
  m.def(
      "bias_activation_fwd(Tensor x, Tensor? bias, Tensor? seed, int activation, int threshold, "
      "float scale) -> Tensor");
  m.def(
      "bias_activation_bwd(Tensor grad_out, Tensor x, Tensor? bias, Tensor? seed, int activation, "
      "int threshold, float scale, bool bias_grad) -> (Tensor, Tensor?)");
  m.def(
      "cross_entropy_fwd(Tensor logits, Tensor target, Tensor? weight, int ignore_index, "
      "float smoothing) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cross_entropy_bwd(Tensor grad_losses, Tensor lse, Tensor logits, Tensor target, "
      "Tensor? weight, int ignore_index, float smoothing, Tensor(a!) grad) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_native, CPU, m) {
  m.impl("dropout_fwd", TORCH_BOX(&fusedformer::dropout_fwd));
  m.impl("dropout_add_layer_norm_fwd", TORCH_BOX(&fusedformer::dropout_add_layer_norm_fwd));
  m.impl("norm_plain", TORCH_BOX(&fusedformer::norm_plain));
  m.impl("dropout_add_layer_norm_bwd", TORCH_BOX(&fusedformer::dropout_add_layer_norm_bwd));
  m.impl("bias_activation_fwd", TORCH_BOX(&fusedformer::bias_activation_fwd));
  m.impl("bias_activation_bwd", TORCH_BOX(&fusedformer::bias_activation_bwd));
  m.impl("cross_entropy_fwd", TORCH_BOX(&fusedformer::cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&fusedformer::cross_entropy_bwd));
}
