// csrc/cuda/tensor_map.h with functions of ours in the place of the CUDA runtime's and driver's,
// which note what they are asked for. tests/test_native_build_cuda.py builds and calls it.
#include <cuda.h>
#include <cuda_runtime_api.h>

static CUresult answer;
static cudaError_t asked;
static unsigned long long seen[24];

static CUresult encode(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void* data,
                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                       const cuuint32_t* every, CUtensorMapInterleave interleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                       CUtensorMapFloatOOBfill fill) {
  unsigned long long* to = seen;
  for (unsigned long long value : {(unsigned long long)type, (unsigned long long)rank,
                                   (unsigned long long)data, (unsigned long long)interleave,
                                   (unsigned long long)swizzle, (unsigned long long)fill})
    *to++ = value;
  for (int d = 0; d < 4; ++d) *to++ = sizes[d];
  for (int d = 0; d < 3; ++d) *to++ = strides[d];
  for (int d = 0; d < 4; ++d) *to++ = box[d];
  for (int d = 0; d < 4; ++d) *to++ = every[d];
  return answer;
}

static cudaError_t entry_point(const char* name, void** function, ...) {
  *function = __builtin_strcmp(name, "cuTensorMapEncodeTiled") ? nullptr : (void*)&encode;
  return asked;
}
#define cudaGetDriverEntryPointByVersion(name, function, version, flags, found) \
  (*(found) = cudaDriverEntryPointSuccess, entry_point(name, function, flags))
#define cudaGetDriverEntryPoint(name, function, flags, found) \
  (*(found) = cudaDriverEntryPointSuccess, entry_point(name, function, flags))
#include "tensor_map.h"

using namespace fusedformer::hopper;

extern "C" __attribute__((visibility("default"))) const char* make(
    int error, int result, void* data, const long long* strides, const int* sizes, int float16,
    int rows, unsigned long long* arguments) {
  static std::string said;
  asked = cudaError_t(error), answer = CUresult(result), said = "";
  try {
    tensor_map({data, strides[0], strides[1], strides[2]},
               float16 ? DType::float16 : DType::bfloat16, sizes[0], sizes[1], sizes[2], sizes[3],
               rows);
    memcpy(arguments, seen, sizeof(seen));
  } catch (const std::runtime_error& error) {
    said = error.what();
  }
  return said.c_str();
}
