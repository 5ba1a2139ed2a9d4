// Attention's forward on Hopper for 193 <= D <= 256.
#include "attention_forward_launch.h"

namespace fusedformer {
namespace hopper {

template void launch_forward<256>(const Attention&, cudaStream_t);

}  // namespace hopper
}  // namespace fusedformer
