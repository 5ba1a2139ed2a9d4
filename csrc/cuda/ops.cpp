// Entry points of the CUDA kernels: torch.ops.fusedformer_cuda.attention_fwd and attention_bwd.
//
// As in csrc/cpu: they take tensors of the LibTorch stable ABI, allocate what they return, and call
// launchers on plain pointers. They trust what kernels/attention.py and kernels/cuda/attention.py
// checked. Nothing here waits for the GPU, and all runs on torch's current stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "attention.h"

// A torch without CUDA does not have it: weak, so that the library still loads there.
extern "C" {
extern __attribute__((weak)) decltype(aoti_torch_get_current_cuda_stream)
    aoti_torch_get_current_cuda_stream;
}

namespace fusedformer {
namespace {

using hopper::Attention;
using hopper::AttentionGrads;
using hopper::Tensor4;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// --- Tensors -------------------------------------------------------------------------------------

// Uninitialised, on the device of a tensor. By the C function itself: torch::stable::new_empty()
// looks its op up by name.
Tensor empty_strided(const Tensor& like, int64_t dims, const int64_t* sizes, const int64_t* strides,
                     ScalarType dtype) {
  int32_t device_type, device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device));
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, code, device_type, device, &handle));
  return Tensor(handle);
}

// Fresh, of a (B, H, N, D) tensor's shape and dtype, in (B, N, H, D) memory order.
Tensor new_bhnd(const Tensor& like) {
  const int64_t heads = like.size(1), length = like.size(2), dim = like.size(3);
  const int64_t sizes[] = {like.size(0), heads, length, dim};
  const int64_t strides[] = {length * heads * dim, dim, heads * dim, 1};
  return empty_strided(like, 4, sizes, strides, like.scalar_type());
}

Tensor new_flat(const Tensor& like, int64_t size, ScalarType dtype) {
  const int64_t stride = 1;
  return empty_strided(like, 1, &size, &stride, dtype);
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

Tensor4 bhnd(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

// --- Calls ---------------------------------------------------------------------------------------

Attention call_of(const Tensor& query, const Tensor& key, const Tensor& value,
                  const OptionalTensor& key_lengths, const OptionalTensor& seed, int64_t diagonal,
                  double scale, int64_t threshold, double inverse_keep, int64_t batch_offset,
                  int64_t head_offset, int64_t query_offset, int64_t key_offset) {
  Attention p{};
  p.batches = static_cast<int>(query.size(0));
  p.heads = static_cast<int>(query.size(1));
  p.key_heads = static_cast<int>(key.size(1));
  p.n_queries = static_cast<int>(query.size(2));
  p.n_keys = static_cast<int>(key.size(2));
  p.dim = static_cast<int>(query.size(3));
  p.dtype = query.scalar_type() == ScalarType::BFloat16 ? hopper::DType::bfloat16
                                                        : hopper::DType::float16;
  p.query = bhnd(query);
  p.key = bhnd(key);
  p.value = bhnd(value);
  p.key_lengths = data_or_null<int32_t>(key_lengths);
  p.diagonal = diagonal;
  p.scale = static_cast<float>(scale);
  p.seed = data_or_null<int64_t>(seed);
  p.threshold = static_cast<uint32_t>(threshold);
  p.inverse_keep = static_cast<float>(inverse_keep);
  p.offsets[0] = batch_offset;
  p.offsets[1] = head_offset;
  p.offsets[2] = query_offset;
  p.offsets[3] = key_offset;
  return p;
}

CUstream_st* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<CUstream_st*>(stream);
}

std::tuple<Tensor, Tensor> attention_fwd(
    const Tensor& query, const Tensor& key, const Tensor& value, OptionalTensor key_lengths,
    OptionalTensor seed, int64_t diagonal, double scale, int64_t threshold, double inverse_keep,
    int64_t batch_offset, int64_t head_offset, int64_t query_offset, int64_t key_offset) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Attention p = call_of(query, key, value, key_lengths, seed, diagonal, scale, threshold,
                        inverse_keep, batch_offset, head_offset, query_offset, key_offset);
  const Tensor out = new_bhnd(query);
  const int64_t sizes[] = {p.batches, p.heads, p.n_queries};
  const int64_t strides[] = {sizes[1] * sizes[2], sizes[2], 1};
  const Tensor lse = empty_strided(query, 3, sizes, strides, ScalarType::Float);
  const Tensor counter = new_flat(query, 1, ScalarType::Int);
  p.out = bhnd(out);
  p.lse = data<float>(lse);
  p.counter = data<int>(counter);
  hopper::attention_forward(p, current_stream(query));
  return {out, lse};
}

// out, lse, grad_out and grad_lse are laid out as attention.h has it.
std::tuple<Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& grad_out, OptionalTensor grad_lse, const Tensor& out, const Tensor& lse,
    const Tensor& query, const Tensor& key, const Tensor& value, OptionalTensor key_lengths,
    OptionalTensor seed, int64_t diagonal, double scale, int64_t threshold, double inverse_keep,
    int64_t batch_offset, int64_t head_offset, int64_t query_offset, int64_t key_offset,
    bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Attention p = call_of(query, key, value, key_lengths, seed, diagonal, scale, threshold,
                        inverse_keep, batch_offset, head_offset, query_offset, key_offset);
  p.out = bhnd(out);
  p.lse = const_cast<float*>(static_cast<const float*>(lse.const_data_ptr()));
  const Tensor grad_query = new_bhnd(query), grad_key = new_bhnd(key), grad_value = new_bhnd(value);
  const int64_t bytes = hopper::attention_backward_workspace(p, deterministic);
  const Tensor workspace = new_flat(query, bytes, ScalarType::Byte);
  AttentionGrads g{};
  g.grad_out = bhnd(grad_out);
  g.grad_query = bhnd(grad_query);
  g.grad_key = bhnd(grad_key);
  g.grad_value = bhnd(grad_value);
  g.grad_lse = data_or_null<float>(grad_lse);
  g.deterministic = deterministic;
  g.workspace = workspace.mutable_data_ptr();
  hopper::attention_backward(p, g, current_stream(query));
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace fusedformer

#define FUSEDFORMER_ATTENTION_ARGUMENTS                                                          \
  "Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? seed, int diagonal, "    \
  "float scale, int threshold, float inverse_keep, int batch_offset, int head_offset, "          \
  "int query_offset, int key_offset"

STABLE_TORCH_LIBRARY_FRAGMENT(fusedformer_cuda, m) {
  m.def("attention_fwd(" FUSEDFORMER_ATTENTION_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, "
        FUSEDFORMER_ATTENTION_ARGUMENTS ", bool deterministic) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_cuda, CUDA, m) {
  m.impl("attention_fwd", TORCH_BOX(&fusedformer::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&fusedformer::attention_bwd));
}
