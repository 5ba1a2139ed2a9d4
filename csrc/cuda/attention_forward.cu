// Attention's forward on Hopper: which size of tile takes a call.
#include <stdexcept>

#include "attention.h"

namespace fusedformer {
namespace hopper {

// Compiled in attention_forward_*.cu.
template <int kDim>
void launch_forward(const Attention& p, CUstream_st* stream);

void attention_forward(const Attention& p, CUstream_st* stream) {
  if (p.dim <= 64) return launch_forward<64>(p, stream);
  if (p.dim <= 96) return launch_forward<96>(p, stream);
  if (p.dim <= 128) return launch_forward<128>(p, stream);
  if (p.dim <= 192) return launch_forward<192>(p, stream);
  if (p.dim <= 256) return launch_forward<256>(p, stream);
  throw std::runtime_error("attention: the forward takes head dimensions up to 256");
}

}  // namespace hopper
}  // namespace fusedformer
