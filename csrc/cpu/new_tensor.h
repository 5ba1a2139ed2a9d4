// Fresh tensors on the CPU, uninitialised. For entry points only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fusedformer {

// Fresh memory costs a fault at each page's first write, which for large outputs takes longer than
// the kernel: asks for pages of 2 MB, where the system leaves that to programs. A hint, no more,
// and one that stays with the memory when it is used again. Not above 32 MB, from where on glibc
// maps every tensor anew: where a system hands free memory back to its host, that takes anything
// from a quarter to four times as long as with small pages (docs/notes.md). Torch's own switch,
// THP_MEM_ALLOC_ENABLE=1, asks for large pages there, too.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 65536;  // a multiple of every system's
  constexpr int64_t kWorthIt = 4 << 20, kMappedAnew = 32 << 20;
  if (bytes < kWorthIt || bytes > kMappedAnew) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// By the C function itself: torch::stable::new_empty() looks its op up by name, which takes longer
// than a small call's arithmetic.
inline torch::stable::Tensor empty_strided(int64_t dims, const int64_t* sizes,
                                           const int64_t* strides,
                                           torch::headeronly::ScalarType dtype) {
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  const torch::stable::Tensor tensor(handle);
  int64_t bytes = static_cast<int64_t>(tensor.element_size());
  for (int64_t dim = 0; dim < dims; ++dim) bytes *= sizes[dim];
  advise_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

}  // namespace fusedformer
