// The tables of attention's kernels.
#include "attention_backward.h"
#include "attention_forward.h"
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

extern const AttentionForwardKernels FUSEDFORMER_NAME(attention_forward_kernels) = {
    forward_scratch<Math>,
    forward<Math>,
};

extern const AttentionBackwardKernels FUSEDFORMER_NAME(attention_backward_kernels) = {
    backward_scratch<Math>, query_tile_bytes<Math>, prepare<Math>,
    key_block<Math>,        mask_grad,
};

}  // namespace fusedformer
