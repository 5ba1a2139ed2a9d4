// Fresh tensors on the CPU, uninitialised. For entry points only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace fusedformer {

// By the C function itself: torch::stable::new_empty() looks its op up by name, which takes longer
// than a small call's arithmetic.
inline torch::stable::Tensor empty_strided(int64_t dims, const int64_t* sizes,
                                           const int64_t* strides,
                                           torch::headeronly::ScalarType dtype) {
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace fusedformer
