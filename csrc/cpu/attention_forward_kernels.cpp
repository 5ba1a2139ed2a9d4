// The table of the forward's kernels.
#include "attention_forward.h"

namespace fusedformer {

#ifdef __AVX512BF16__
using Math = Bfloat16;
#else
using Math = Float32;
#endif

extern const AttentionForwardKernels FUSEDFORMER_NAME(attention_forward_kernels) = {
    forward_scratch<Math>,
    forward<Math>,
};

}  // namespace fusedformer
