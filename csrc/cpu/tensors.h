// Tensors of the stable ABI as the row kernels take them. For entry points only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "new_tensor.h"
#include "rows.h"

namespace fusedformer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline Type type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::Half: return Type::float16;
    case ScalarType::BFloat16: return Type::bfloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "the C++ kernels take float32, float16 and bfloat16");
  return Type::float32;
}

inline int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

constexpr int64_t kMaskBits = 16;  // columns that one call of the random numbers decides

inline int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

inline int64_t width_of(const Tensor& tensor) {
  return tensor.dim() == 0 ? 1 : tensor.size(tensor.dim() - 1);
}

// A tensor as rows of its last dimension; holds the copy where strides allow no view.
struct Rows {
  Tensor tensor;
  Matrix matrix;
};

// The distance from one row to the next; nothing where rows are no matrix of neighbouring columns.
inline std::optional<int64_t> row_stride(const Tensor& tensor, int64_t width) {
  const int64_t dims = tensor.dim();
  if (dims > 0 && width > 1 && tensor.stride(dims - 1) != 1) return std::nullopt;
  std::optional<int64_t> stride;
  int64_t span = 0;  // what the stride of the next dimension has to be
  for (int64_t dim = dims - 2; dim >= 0; --dim) {
    if (tensor.size(dim) == 1) continue;
    if (stride && tensor.stride(dim) != span) return std::nullopt;
    if (!stride) stride = tensor.stride(dim);
    span = tensor.stride(dim) * tensor.size(dim);
  }
  return stride.value_or(width);
}

inline Rows rows_of(const Tensor& tensor, int64_t width) {
  std::optional<int64_t> stride = row_stride(tensor, width);
  Rows rows{stride ? tensor : torch::stable::contiguous(tensor), {}};
  rows.matrix = {const_cast<void*>(rows.tensor.const_data_ptr()), stride.value_or(width),
                 type_of(tensor.scalar_type())};
  return rows;
}

inline std::optional<Rows> rows_of(const std::optional<Tensor>& tensor, int64_t width) {
  return tensor ? std::optional<Rows>(rows_of(*tensor, width)) : std::nullopt;
}

inline Matrix matrix_of(const std::optional<Rows>& rows) { return rows ? rows->matrix : Matrix{}; }

// A fresh tensor that kernels write as rows.
inline Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t dim = sizes.size(); dim-- > 1;) strides[dim - 1] = strides[dim] * sizes[dim];
  return empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype);
}

inline Matrix output(const Tensor& tensor, int64_t width) {
  return {tensor.mutable_data_ptr(), width, type_of(tensor.scalar_type())};
}

inline Matrix output(const std::optional<Tensor>& tensor, int64_t width) {
  return tensor ? output(*tensor, width) : Matrix{};
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// A vector as float32: its own memory where it has that already.
class FloatVector {
 public:
  FloatVector(const std::optional<Tensor>& tensor, int64_t width, float missing) {
    if (!tensor) {
      values_.assign(width, missing);
      return;
    }
    kept_ = tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor);
    const void* data = kept_->const_data_ptr();
    switch (type_of(kept_->scalar_type())) {
      case Type::float32: data_ = static_cast<const float*>(data); break;
      case Type::float16: convert(static_cast<const torch::headeronly::Half*>(data), width); break;
      case Type::bfloat16: convert(static_cast<const torch::headeronly::BFloat16*>(data), width);
    }
  }
  const float* data() const { return data_ ? data_ : values_.data(); }

 private:
  template <class T>
  void convert(const T* data, int64_t width) {
    values_.assign(data, data + width);
  }
  std::optional<Tensor> kept_;
  const float* data_ = nullptr;
  std::vector<float> values_;
};

// Writes float32 values as a tensor of its dtype.
inline void write(const Tensor& tensor, const float* values, int64_t first, int64_t last) {
  void* data = tensor.mutable_data_ptr();
  const auto convert = [&](auto* out) {
    for (int64_t n = first; n < last; ++n) out[n] = values[n - first];
  };
  switch (type_of(tensor.scalar_type())) {
    case Type::float32: convert(static_cast<float*>(data)); break;
    case Type::float16: convert(static_cast<torch::headeronly::Half*>(data)); break;
    case Type::bfloat16: convert(static_cast<torch::headeronly::BFloat16*>(data));
  }
}

// Scratch memory on cache lines, uninitialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 127) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

inline Dropout dropout_of(const std::optional<Tensor>& seed, int64_t threshold, double scale) {
  if (!seed) return {};
  return {true, static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr())),
          static_cast<uint32_t>(threshold), static_cast<float>(scale)};
}

// Outputs so large that they will have left the caches before anyone reads them, whose rows start
// on cache lines: measured, storing past the caches wins from 32 MB on and loses at 16 MB.
inline bool past_caches(int64_t rows, int64_t width, std::initializer_list<Matrix> outputs) {
  bool large = false;
  for (const Matrix& matrix : outputs) {
    if (!matrix.data) continue;
    const int64_t bytes = width * size_of(matrix.type);
    if (bytes % 64 || reinterpret_cast<uintptr_t>(matrix.data) % 64) return false;
    large = large || rows * bytes >= int64_t{32} << 20;
  }
  return large;
}

// Fewer elements than this are not worth a thread.
constexpr int64_t kGrain = 32768;

}  // namespace fusedformer
