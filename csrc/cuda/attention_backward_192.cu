// Attention's backward on Hopper for 129 <= D <= 192.
#include "attention_backward_launch.h"

namespace fusedformer {
namespace hopper {

template void launch_backward<192>(const Attention&, const AttentionGrads&, cudaStream_t);
template int64_t backward_workspace_bytes<192>(const Attention&, bool);

}  // namespace hopper
}  // namespace fusedformer
