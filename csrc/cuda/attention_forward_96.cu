// Attention's forward on Hopper for 65 <= D <= 96.
#include "attention_forward_launch.h"

namespace fusedformer {
namespace hopper {

template void launch_forward<96>(const Attention&, cudaStream_t);

}  // namespace hopper
}  // namespace fusedformer
