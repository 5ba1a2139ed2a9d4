// The variants as benchmarks/tune_cuda.py calls them, by ctypes.
#include <string>

#include "launch_variants.h"

namespace {

using fusedformer::hopper::Attention;
using fusedformer::hopper::Variant;

const std::vector<Variant>& all() {
  using namespace fusedformer::hopper;
  static const std::vector<Variant> found = [] {
    std::vector<Variant> joined;
    for (const auto& list :
         {variants_64(), variants_96(), variants_128(), variants_192(), variants_256()})
      joined.insert(joined.end(), list.begin(), list.end());
    return joined;
  }();
  return found;
}

}  // namespace

extern "C" {

#define FUSEDFORMER_EXPORT __attribute__((visibility("default")))

FUSEDFORMER_EXPORT int variant_count() { return static_cast<int>(all().size()); }
FUSEDFORMER_EXPORT const char* variant_name(int i) { return all()[i].name; }
FUSEDFORMER_EXPORT int variant_dim(int i) { return all()[i].dim; }
FUSEDFORMER_EXPORT bool variant_takes(int i, bool dropout) {
  return dropout ? all()[i].takes_dropout : all()[i].takes_plain;
}
FUSEDFORMER_EXPORT int attention_bytes() { return sizeof(Attention); }

// Launches; null, or why not.
FUSEDFORMER_EXPORT const char* variant_run(int i, const Attention* p, CUstream_st* stream) {
  static std::string error;
  try {
    all()[i].run(*p, stream);
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}
}
