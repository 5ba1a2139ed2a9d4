// Tensor maps: what TMA has to know of a (B, H, N, D) tensor. For launchers, on the host.
//
// The driver makes them. It is asked through the CUDA runtime, so that the library needs no
// libcuda.so to load and none to link.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <string.h>

#include <stdexcept>
#include <string>

#include "attention.h"
#include "hopper.h"

namespace fusedformer {
namespace hopper {

constexpr int kBoxColumns = 64;  // of 16 bits: 128 bytes, which is a row of a swizzled panel

inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("attention: the CUDA driver cannot be asked (") +
                             cudaGetErrorString(error) + ")");
  if (found != cudaDriverEntryPointSuccess || !function)
    throw std::runtime_error("attention: the CUDA driver has no tensor maps; it is before 12.0");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// The map of a tensor whose boxes are `rows` rows of 64 elements, swizzled by 128 bytes. What a box
// has outside the tensor (rows from `length` on, columns from `dim` on) is read as 0 and not
// written.
//
// Data on 16 bytes, strides multiples of 16 bytes below 2^40 bytes, 1 to 256 rows.
inline TensorMap tensor_map(const Tensor4& tensor, DType dtype, int batches, int heads, int length,
                            int dim, int rows) {
  static const auto encode = tensor_map_encoder();
  constexpr cuuint64_t kBytes = 2;  // of an element
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(length),
                              static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batches)};
  // That of the columns is known to be 1. Where there is one row, head or batch, its stride means
  // nothing, and may be one that TMA would refuse.
  const auto stride = [](int64_t elements, int size) {
    return size == 1 ? 16 : static_cast<cuuint64_t>(elements) * kBytes;
  };
  const cuuint64_t strides[] = {stride(tensor.row, length), stride(tensor.head, heads),
                                stride(tensor.batch, batches)};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(rows), 1, 1};
  const cuuint32_t every[] = {1, 1, 1, 1};
  CUtensorMap made;
  const CUresult result = encode(
      &made,
      dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      4, tensor.data, sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    const auto text = [](cuuint64_t n) { return std::to_string(n); };
    throw std::runtime_error("attention: TMA cannot describe a tensor of (B, H, N, D) = (" +
                             text(sizes[3]) + ", " + text(sizes[2]) + ", " + text(sizes[1]) + ", " +
                             text(sizes[0]) + ") with strides of (" + text(strides[2]) + ", " +
                             text(strides[1]) + ", " + text(strides[0]) + ", 2) bytes: " +
                             "CUDA error " + std::to_string(result));
  }
  TensorMap map;
  static_assert(sizeof(map) == sizeof(made), "TensorMap is CUtensorMap by another name");
  memcpy(&map, &made, sizeof(map));
  return map;
}

}  // namespace hopper
}  // namespace fusedformer
