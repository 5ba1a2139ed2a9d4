// The forward's variants for D = 256.
#include "launch_variants.h"

namespace fusedformer {
namespace hopper {

std::vector<Variant> variants_256() {
  return {variant<ForwardTile<256>>(""),
          variant<WithoutTurns<256>>("without turns")};
}

}  // namespace hopper
}  // namespace fusedformer
