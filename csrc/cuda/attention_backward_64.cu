// Attention's backward on Hopper for D <= 64.
#include "attention_backward_launch.h"

namespace fusedformer {
namespace hopper {

template void launch_backward<64>(const Attention&, const AttentionGrads&, cudaStream_t);
template int64_t backward_workspace_bytes<64>(const Attention&, bool);

}  // namespace hopper
}  // namespace fusedformer
