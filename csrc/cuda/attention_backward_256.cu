// Attention's backward on Hopper for 193 <= D <= 256.
#include "attention_backward_launch.h"

namespace fusedformer {
namespace hopper {

template void launch_backward<256>(const Attention&, const AttentionGrads&, cudaStream_t);
template int64_t backward_workspace_bytes<256>(const Attention&, bool);

}  // namespace hopper
}  // namespace fusedformer
