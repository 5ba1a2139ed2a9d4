// Attention's backward on Hopper: which size of tile takes a call.
#include <stdexcept>

#include "attention.h"

namespace fusedformer {
namespace hopper {

// Compiled in attention_backward_*.cu.
template <int kDim>
void launch_backward(const Attention& p, const AttentionGrads& g, CUstream_st* stream);
template <int kDim>
int64_t backward_workspace_bytes(const Attention& p, bool deterministic);

void attention_backward(const Attention& p, const AttentionGrads& g, CUstream_st* stream) {
  if (p.dim <= 64) return launch_backward<64>(p, g, stream);
  if (p.dim <= 96) return launch_backward<96>(p, g, stream);
  if (p.dim <= 128) return launch_backward<128>(p, g, stream);
  if (p.dim <= 192) return launch_backward<192>(p, g, stream);
  if (p.dim <= 256) return launch_backward<256>(p, g, stream);
  throw std::runtime_error("attention: the backward takes head dimensions up to 256");
}

int64_t attention_backward_workspace(const Attention& p, bool deterministic) {
  if (p.dim <= 64) return backward_workspace_bytes<64>(p, deterministic);
  if (p.dim <= 96) return backward_workspace_bytes<96>(p, deterministic);
  if (p.dim <= 128) return backward_workspace_bytes<128>(p, deterministic);
  if (p.dim <= 192) return backward_workspace_bytes<192>(p, deterministic);
  return backward_workspace_bytes<256>(p, deterministic);
}

}  // namespace hopper
}  // namespace fusedformer
