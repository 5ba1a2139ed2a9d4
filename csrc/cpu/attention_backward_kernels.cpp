// The table of the backward's kernels.
#include "attention_backward.h"
#ifndef __AVX512BF16__
#include "attention_mask_grad.h"
#endif

namespace fusedformer {

#ifdef __AVX512BF16__
using Math = Bfloat16;
constexpr auto mask_grad = nullptr;  // avx512's
#else
using Math = Float32;
#endif

extern const AttentionBackwardKernels FUSEDFORMER_NAME(attention_backward_kernels) = {
    backward_scratch<Math>, query_tile_bytes<Math>, prepare<Math>,
    key_block<Math>,        mask_grad,
};

}  // namespace fusedformer
