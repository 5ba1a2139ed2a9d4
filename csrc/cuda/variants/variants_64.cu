// The forward's variants for D = 64.
#include "launch_variants.h"

namespace fusedformer {
namespace hopper {

std::vector<Variant> variants_64() {
  return {variant<ForwardTile<64>>(""),
          variant<ThreeConsumers, true, false>("three consumers"),
          variant<WithoutTurns<64>>("without turns"),
          variant<ThreeStages>("three stages"),
          variant<TwoProducers<64>, false>("two producers")};
}

}  // namespace hopper
}  // namespace fusedformer
