// Attention's forward on Hopper for D <= 64.
#include "attention_forward_launch.h"

namespace fusedformer {
namespace hopper {

template void launch_forward<64>(const Attention&, cudaStream_t);

}  // namespace hopper
}  // namespace fusedformer
