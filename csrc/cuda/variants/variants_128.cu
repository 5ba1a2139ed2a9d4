// The forward's variants for D = 128.
#include "launch_variants.h"

namespace fusedformer {
namespace hopper {

std::vector<Variant> variants_128() {
  return {variant<ForwardTile<128>>(""),
          variant<WiderBlocks>("blocks of 176 keys"),
          variant<WithoutTurns<128>>("without turns"),
          variant<TwoProducers<128>, false>("two producers")};
}

}  // namespace hopper
}  // namespace fusedformer
