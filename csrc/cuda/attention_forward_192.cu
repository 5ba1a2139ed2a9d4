// Attention's forward on Hopper for 129 <= D <= 192.
#include "attention_forward_launch.h"

namespace fusedformer {
namespace hopper {

template void launch_forward<192>(const Attention&, cudaStream_t);

}  // namespace hopper
}  // namespace fusedformer
