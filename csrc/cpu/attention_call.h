// The arguments of attention's entry points as the kernels take them. For entry points only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>

#include "attention.h"
#include "new_tensor.h"

namespace fusedformer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    case ScalarType::Bool: return DType::boolean;
    default: STD_TORCH_CHECK(false, "attention: a dtype that the C++ kernels do not take");
  }
  return DType::float32;
}

// The kernels take any strides but that of D: such a tensor is copied.
inline Tensor readable(const Tensor& tensor) {
  return tensor.size(3) == 1 || tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor4 view(const Tensor& tensor, const void* data) {
  const int64_t size = bytes_of(dtype_of(tensor));
  const auto strides = tensor.strides();
  return {static_cast<char*>(const_cast<void*>(data)), strides[0] * size, strides[1] * size,
          strides[2] * size};
}
inline Tensor4 input(const Tensor& tensor) { return view(tensor, tensor.const_data_ptr()); }

// A fresh (B, H, N, D) tensor in (B, N, H, D) memory order.
inline Tensor new_bhnd(const Tensor& like) {
  const auto sizes = like.sizes();
  const int64_t heads = sizes[1], length = sizes[2], dim = sizes[3];
  const int64_t strides[] = {length * heads * dim, dim, heads * dim, 1};
  return empty_strided(4, sizes.data(), strides, like.scalar_type());
}
inline Tensor4 output(const Tensor& tensor) { return view(tensor, tensor.mutable_data_ptr()); }

// What the forward and the backward are given alike. Holds the copies it makes.
struct Call {
  Tensor query, key, value;
  Attention p;

  // Without options: no query is kept from any key.
  Call(const Tensor& query_, const Tensor& key_, const Tensor& value_)
      : query(readable(query_)), key(readable(key_)), value(readable(value_)), p{} {
    const auto sizes = query.sizes(), key_sizes = key.sizes();
    p.batches = sizes[0];
    p.heads = sizes[1];
    p.key_heads = key_sizes[1];
    p.n_queries = sizes[2];
    p.n_keys = key_sizes[2];
    p.dim = static_cast<int>(sizes[3]);
    p.dtype = dtype_of(query);
    p.query = input(query);
    p.key = input(key);
    p.value = input(value);
    p.diagonal = p.n_keys;
    p.inverse_keep = 1;
  }

  Call(const Tensor& query_, const Tensor& key_, const Tensor& value_,
       const std::optional<Tensor>& mask, const std::optional<Tensor>& key_lengths,
       int64_t diagonal, double scale, const std::optional<Tensor>& seed, int64_t threshold,
       double inverse_keep, int64_t batch_offset, int64_t head_offset, int64_t query_offset,
       int64_t key_offset)
      : Call(query_, key_, value_) {
    if (mask) {
      p.mask = static_cast<const char*>(mask->const_data_ptr());
      p.mask_dtype = dtype_of(*mask);
      for (int d = 0; d < 4; ++d)
        p.mask_strides[d] = mask->size(d) == 1 ? 0 : mask->stride(d) * bytes_of(p.mask_dtype);
    }
    if (key_lengths) p.key_lengths = static_cast<const int32_t*>(key_lengths->const_data_ptr());
    p.diagonal = diagonal;
    p.scale = static_cast<float>(scale);
    if (seed) {
      p.dropout = true;
      p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
      p.threshold = static_cast<uint32_t>(threshold);
      p.inverse_keep = static_cast<float>(inverse_keep);
    }
    const int64_t offsets[4] = {batch_offset, head_offset, query_offset, key_offset};
    for (int d = 0; d < 4; ++d) p.offsets[d] = offsets[d];
  }
};

namespace {

// --- Without options -----------------------------------------------------------------------------

// Whether these may be the arguments of a call without options. Only what is usual: of the rest,
// Python says what is wrong, or hands it to another backend.
bool usual(const Tensor& query, const Tensor& key, const Tensor& value,
           const std::optional<double>& scale) {
  const ScalarType dtype = query.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half)
    return false;
  const auto q = query.sizes(), k = key.sizes(), v = value.sizes();
  if (key.scalar_type() != dtype || value.scalar_type() != dtype) return false;
  if (scale && !std::isfinite(*scale)) return false;
  if (q.size() != 4 || k.size() != 4 || v.size() != 4) return false;
  for (int d = 0; d < 4; ++d)
    if (q[d] < 1 || k[d] < 1 || v[d] != k[d]) return false;
  return k[0] == q[0] && k[3] == q[3] && q[3] <= MAX_DIM && q[1] % k[1] == 0;
}

// The call without options.
Call plain_call(const Tensor& query, const Tensor& key, const Tensor& value, bool causal,
                const std::optional<double>& scale) {
  Call call(query, key, value);
  if (causal) call.p.diagonal = call.p.n_keys - call.p.n_queries;
  call.p.scale = static_cast<float>(scale ? *scale : std::pow(call.p.dim, -0.5));
  return call;
}

}  // namespace
}  // namespace fusedformer
