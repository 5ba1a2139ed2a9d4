// The forward's variants for D = 96.
#include "launch_variants.h"

namespace fusedformer {
namespace hopper {

std::vector<Variant> variants_96() {
  return {variant<ForwardTile<96>>(""),
          variant<PartialPanels>("partial panels")};
}

}  // namespace hopper
}  // namespace fusedformer
