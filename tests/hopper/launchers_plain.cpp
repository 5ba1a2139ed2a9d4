// The launchers of csrc/cuda/attention.h as plain loops over host memory: what they promise,
// written out. With ops.cpp it makes a library that runs on a CPU, so that all between Python and a
// launch is tested without a GPU: each argument, size, stride and option. tests/test_cuda_calls.py
// builds it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#define CUDA CPU  // the dispatch key of its entry points
#include "cuda/ops.cpp"
#undef CUDA
#include "philox.h"

// Of a torch with CUDA alone: no stream, and a guard of nothing.
static int guards = 0;
extern "C" {
__attribute__((visibility("default"))) int fusedformer_guards() { return guards; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(static_cast<intptr_t>(1000 + device));
  return 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(&guards);
  ++guards;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
}

namespace fusedformer {
namespace hopper {
namespace {

template <class T>
T& at(const Tensor4& t, int64_t b, int64_t h, int64_t n, int64_t d) {
  return static_cast<T*>(t.data)[b * t.batch + h * t.head + n * t.row + d];
}

struct Row {
  std::vector<int> keys;        // those that are seen
  std::vector<double> weights;  // exp(score - LSE)
  std::vector<double> kept;     // 0 or 1 / (1 - p)
  double lse;
};

template <class T>
Row row_of(const Attention& p, int b, int h, int i) {
  const int key_head = h / (p.heads / p.key_heads);
  const int length = p.key_lengths ? std::clamp(p.key_lengths[b], 0, p.n_keys) : p.n_keys;
  Row row;
  double sum = 0;
  for (int j = 0; j < length && j <= i + p.diagonal; ++j) {
    double score = 0;
    for (int d = 0; d < p.dim; ++d)
      score += double(at<T>(p.query, b, h, i, d)) * double(at<T>(p.key, b, key_head, j, d));
    row.keys.push_back(j);
    row.weights.push_back(std::exp(p.scale * score));
    sum += row.weights.back();
    double kept = 1;
    if (p.seed) {
      uint32_t words[4];
      const int64_t n = p.offsets[2] + i, m = p.offsets[3] + j;
      philox::attention_counter(p.offsets[0] + b, p.offsets[1] + h, n, m, words);
      philox::philox4x32(*p.seed, words);
      const uint32_t word = words[2 * (n % 2) + m % 2];
      kept = philox::kept(word, 2 * (n / 8 % 2) + m / 8 % 2, p.threshold) ? p.inverse_keep : 0;
    }
    row.kept.push_back(kept);
  }
  for (double& weight : row.weights) weight /= sum;
  row.lse = std::log(sum);  // -inf where no key is seen
  return row;
}

template <class T>
void forward(const Attention& p) {
  for (int b = 0; b < p.batches; ++b)
    for (int h = 0; h < p.heads; ++h)
      for (int i = 0; i < p.n_queries; ++i) {
        const Row row = row_of<T>(p, b, h, i);
        p.lse[(int64_t(b) * p.heads + h) * p.n_queries + i] = float(row.lse);
        for (int d = 0; d < p.dim; ++d) {
          double sum = 0;
          for (size_t k = 0; k < row.keys.size(); ++k)
            sum += row.weights[k] * row.kept[k] *
                   double(at<T>(p.value, b, h / (p.heads / p.key_heads), row.keys[k], d));
          at<T>(p.out, b, h, i, d) = T(float(sum));
        }
      }
}

// The saved LSE and O are read, as the kernels read them: P = exp(S - LSE), shift = rowsum(dO o O).
template <class T>
void backward(const Attention& p, const AttentionGrads& g) {
  const int group = p.heads / p.key_heads;
  const size_t size = size_t(p.n_keys) * p.dim;
  for (int b = 0; b < p.batches; ++b)
    for (int key_head = 0; key_head < p.key_heads; ++key_head) {
      std::vector<double> grad_key(size), grad_value(size);
      for (int h = key_head * group; h < (key_head + 1) * group; ++h)
        for (int i = 0; i < p.n_queries; ++i) {
          const Row row = row_of<T>(p, b, h, i);
          const int64_t index = (int64_t(b) * p.heads + h) * p.n_queries + i;
          double shift = g.grad_lse ? -g.grad_lse[index] : 0;
          for (int d = 0; d < p.dim; ++d)
            shift += double(at<T>(g.grad_out, b, h, i, d)) * double(at<T>(p.out, b, h, i, d));
          std::vector<double> grad_query(p.dim);
          for (size_t k = 0; k < row.keys.size(); ++k) {
            const int j = row.keys[k];
            const double weight = row.weights[k] * std::exp(row.lse - p.lse[index]);
            double grad = 0;
            for (int d = 0; d < p.dim; ++d)
              grad += double(at<T>(g.grad_out, b, h, i, d)) *
                      double(at<T>(p.value, b, key_head, j, d));
            const double of_score = p.scale * weight * (row.kept[k] * grad - shift);
            for (int d = 0; d < p.dim; ++d) {
              grad_query[d] += of_score * double(at<T>(p.key, b, key_head, j, d));
              grad_key[size_t(j) * p.dim + d] += of_score * double(at<T>(p.query, b, h, i, d));
              grad_value[size_t(j) * p.dim + d] +=
                  weight * row.kept[k] * double(at<T>(g.grad_out, b, h, i, d));
            }
          }
          for (int d = 0; d < p.dim; ++d)
            at<T>(g.grad_query, b, h, i, d) = T(float(grad_query[d]));
        }
      for (int j = 0; j < p.n_keys; ++j)
        for (int d = 0; d < p.dim; ++d) {
          at<T>(g.grad_key, b, key_head, j, d) = T(float(grad_key[size_t(j) * p.dim + d]));
          at<T>(g.grad_value, b, key_head, j, d) = T(float(grad_value[size_t(j) * p.dim + d]));
        }
    }
}

// What attention.h promises the kernels of every tensor.
void check(const Tensor4& t, const Attention& p, bool of_keys, CUstream_st* stream) {
  const int64_t sizes[] = {p.batches, of_keys ? p.key_heads : p.heads,
                           of_keys ? p.n_keys : p.n_queries};
  const int64_t strides[] = {t.batch, t.head, t.row};
  for (int k = 0; k < 3; ++k)
    if (sizes[k] > 1 && (strides[k] % 8 || strides[k] <= 0))
      throw std::runtime_error("a stride that TMA does not take");
  if (reinterpret_cast<uintptr_t>(t.data) % 16) throw std::runtime_error("data not on 16 bytes");
  if (reinterpret_cast<intptr_t>(stream) != 999) throw std::runtime_error("another stream");
}

}  // namespace

void attention_forward(const Attention& p, CUstream_st* stream) {
  check(p.query, p, false, stream);
  check(p.key, p, true, stream);
  check(p.value, p, true, stream);
  check(p.out, p, false, stream);
  *p.counter = 1;
  p.dtype == DType::bfloat16 ? forward<c10::BFloat16>(p) : forward<c10::Half>(p);
}

int64_t attention_backward_workspace(const Attention& p, bool deterministic) {
  return deterministic ? p.n_queries : 2 * p.n_queries;
}

void attention_backward(const Attention& p, const AttentionGrads& g, CUstream_st* stream) {
  check(p.out, p, false, stream);
  check(g.grad_out, p, false, stream);
  check(g.grad_query, p, false, stream);
  check(g.grad_key, p, true, stream);
  check(g.grad_value, p, true, stream);
  memset(g.workspace, g.deterministic, attention_backward_workspace(p, g.deterministic));
  p.dtype == DType::bfloat16 ? backward<c10::BFloat16>(p, g) : backward<c10::Half>(p, g);
}

}  // namespace hopper
}  // namespace fusedformer
