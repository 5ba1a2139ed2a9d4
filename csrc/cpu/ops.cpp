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
#include "norm_call.h"
#include "row_sums.h"
#include "tensors.h"

namespace fusedformer {
namespace {

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
  if (grad_bias) add_up(sums.data(), chunks, width, width, grad_bias, std::nullopt);
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

// What a call without them leaves out: each that is passed costs a small call time.
#define FUSEDFORMER_NORM_OPTIONS \
  "Tensor? residual=None, Tensor? seed=None, int threshold=0, float scale=1"
#define FUSEDFORMER_NORM_ARGUMENTS                                              \
  "Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-5, " \
  "bool is_rms_norm=False, " FUSEDFORMER_NORM_OPTIONS

STABLE_TORCH_LIBRARY_FRAGMENT(fusedformer_native, m) {
  m.def("dropout_fwd(Tensor x, Tensor seed, int threshold, float scale) -> Tensor");
  m.def(
      "dropout_add_layer_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
      "Tensor? seed, int threshold, float scale, float eps, bool is_rms_norm, bool prenorm, "
      "ScalarType z_dtype) -> (Tensor, Tensor?, Tensor?, Tensor)");
  m.def(
      "dropout_add_layer_norm_bwd(Tensor grad_y, Tensor? grad_z, Tensor source, Tensor? residual, "
      "Tensor? weight, Tensor? bias, Tensor? seed, Tensor? mean, Tensor rstd, int threshold, "
      "float scale, bool prenorm, ScalarType z_dtype, bool residual_grad, bool weight_grad, "
      "bool bias_grad) -> (Tensor, Tensor?, Tensor?, Tensor?)");
  m.def("norm_plain(" FUSEDFORMER_NORM_ARGUMENTS ") -> Tensor?");
  m.def("norm_plain_fwd(" FUSEDFORMER_NORM_ARGUMENTS ") -> (Tensor?, Tensor?)");
  m.def(
      "norm_plain_bwd(Tensor grad_y, Tensor stats, bool residual_grad, bool weight_grad, "
      "bool bias_grad, Tensor x, Tensor? weight, Tensor? bias, " FUSEDFORMER_NORM_OPTIONS
      ") -> (Tensor, Tensor?, Tensor?, Tensor?)");
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
  m.impl("dropout_add_layer_norm_bwd", TORCH_BOX(&fusedformer::dropout_add_layer_norm_bwd));
  m.impl("norm_plain", TORCH_BOX(&fusedformer::norm_plain));
  m.impl("norm_plain_fwd", TORCH_BOX(&fusedformer::norm_plain_fwd));
  m.impl("norm_plain_bwd", TORCH_BOX(&fusedformer::norm_plain_bwd));
  m.impl("bias_activation_fwd", TORCH_BOX(&fusedformer::bias_activation_fwd));
  m.impl("bias_activation_bwd", TORCH_BOX(&fusedformer::bias_activation_bwd));
  m.impl("cross_entropy_fwd", TORCH_BOX(&fusedformer::cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&fusedformer::cross_entropy_bwd));
}
