// The forward's variants for D = 192.
#include "launch_variants.h"

namespace fusedformer {
namespace hopper {

std::vector<Variant> variants_192() {
  return {variant<ForwardTile<192>>(""),
          variant<WithoutTurns<192>>("without turns")};
}

}  // namespace hopper
}  // namespace fusedformer
