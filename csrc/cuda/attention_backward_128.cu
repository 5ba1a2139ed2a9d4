// Attention's backward on Hopper for 97 <= D <= 128.
#include "attention_backward_launch.h"

namespace fusedformer {
namespace hopper {

template void launch_backward<128>(const Attention&, const AttentionGrads&, cudaStream_t);
template int64_t backward_workspace_bytes<128>(const Attention&, bool);

}  // namespace hopper
}  // namespace fusedformer
