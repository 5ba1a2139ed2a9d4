// A list of variants, by name, that can be launched: bfloat16 alone.
#pragma once

#include <vector>

#include "../attention_forward_launch.h"
#include "forward_variants.h"

namespace fusedformer {
namespace hopper {

struct Variant {
  const char* name;  // "": what the library of the kernels has
  int dim;
  bool takes_plain, takes_dropout;
  void (*run)(const Attention& p, cudaStream_t stream);
};

// kPlain, kDropout: whether it is compiled, and measured, without dropout and with it.
template <typename Tile, bool kPlain = true, bool kDropout = true>
Variant variant(const char* name) {
  return {name, Tile::kDim, kPlain, kDropout, [](const Attention& p, cudaStream_t stream) {
            if constexpr (kDropout)
              if (p.seed) return launch<__nv_bfloat16, Tile, true>(p, stream);
            if constexpr (kPlain)
              if (!p.seed) return launch<__nv_bfloat16, Tile, false>(p, stream);
            throw std::runtime_error("attention: the variant is not compiled for this call");
          }};
}

// Each in a file of its own, variants_*.cu, so that they compile side by side.
std::vector<Variant> variants_64();
std::vector<Variant> variants_96();
std::vector<Variant> variants_128();
std::vector<Variant> variants_192();
std::vector<Variant> variants_256();

}  // namespace hopper
}  // namespace fusedformer
