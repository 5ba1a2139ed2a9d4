// Attention's forward on Hopper for 97 <= D <= 128.
#include "attention_forward_launch.h"

namespace fusedformer {
namespace hopper {

template void launch_forward<128>(const Attention&, cudaStream_t);

}  // namespace hopper
}  // namespace fusedformer
