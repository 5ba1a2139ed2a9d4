// The choice of the instruction set, and the ops that show and force it.
#include "isa.h"

#ifdef FUSEDFORMER_X86
#include <cpuid.h>
#endif

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <string>

namespace fusedformer {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

#ifdef FUSEDFORMER_X86
// __builtin_cpu_supports also asks whether the operating system saves the registers; but older
// clang does not know all names: leaf 1 of cpuid, bit 29 of ecx, and leaf 7.1, bit 5 of eax.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}
bool has_avx512bf16() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}
#endif

Isa best() {
#ifdef FUSEDFORMER_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c())
    return Isa::portable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return Isa::avx2;
  return has_avx512bf16() ? Isa::avx512bf16 : Isa::avx512;
#else
  return Isa::portable;
#endif
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

// For tests: forces an instruction set in the whole process, "" for the best; returns the one that
// was in use.
std::string set_isa(std::string name) {
  Isa wanted = best();
  if (!name.empty()) {
    int n = 0;
    while (n <= static_cast<int>(best()) && name != kNames[n]) ++n;
    STD_TORCH_CHECK(n <= static_cast<int>(best()), "set_isa: this CPU has no ", name);
    wanted = static_cast<Isa>(n);
  }
  return kNames[static_cast<int>(current().exchange(wanted))];
}

// Those that this CPU can run, in ascending order, with spaces between.
std::string isas() {
  std::string names = kNames[0];
  for (int n = 1; n <= static_cast<int>(best()); ++n) names = names + " " + kNames[n];
  return names;
}

std::string compiler() {
#ifdef __clang__
  return __VERSION__;  // which names clang
#else
  return "g++ " __VERSION__;
#endif
}

std::string current_isa() { return kNames[static_cast<int>(isa())]; }

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

}  // namespace fusedformer

STABLE_TORCH_LIBRARY_FRAGMENT(fusedformer_native, m) {
  m.def("compiler() -> str");
  m.def("isa() -> str");
  m.def("isas() -> str");
  m.def("set_isa(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_native, CompositeExplicitAutograd, m) {
  m.impl("compiler", TORCH_BOX(&fusedformer::compiler));
  m.impl("isa", TORCH_BOX(&fusedformer::current_isa));
  m.impl("isas", TORCH_BOX(&fusedformer::isas));
  m.impl("set_isa", TORCH_BOX(&fusedformer::set_isa));
}
