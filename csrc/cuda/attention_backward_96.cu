// Attention's backward on Hopper for 65 <= D <= 96.
#include "attention_backward_launch.h"

namespace fusedformer {
namespace hopper {

template void launch_backward<96>(const Attention&, const AttentionGrads&, cudaStream_t);
template int64_t backward_workspace_bytes<96>(const Attention&, bool);

}  // namespace hopper
}  // namespace fusedformer
