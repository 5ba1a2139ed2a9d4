// Which instruction set the kernels of this process use, chosen at run time.
//
// A file csrc/cpu/*_kernels.cpp is compiled once for each instruction set below, with that set's
// compiler flags and FUSEDFORMER_ISA defined as its name; all others once, for the baseline, one
// after the other as one file: no two have the same name for different things.
// A kernels file, with all the headers of kernels that it includes,
//
// - keeps all it defines in an anonymous namespace, but for one table of functions for each header:
//       extern const RowKernels FUSEDFORMER_NAME(row_kernels) = {...};
// - includes no C++ library and no torch header: what is inline there would be compiled with these
//   instructions, and the linker might keep that copy for code that runs on an older CPU.
//
// The header of such a table declares it by FUSEDFORMER_TABLE(RowKernels, row_kernels); the code
// that calls kernels takes FUSEDFORMER_PICK(row_kernels), which is a const RowKernels&.
#pragma once

namespace fusedformer {

// In ascending order: a CPU that has one has those before it.
enum class Isa {
  portable,    // what the compiler targets by itself
  avx2,        // with fma and f16c
  avx512,      // f, bw, vl and dq
  avx512bf16,  // with bfloat16 dot products
};

// The instruction set in use: the best that this CPU has, or the one that was forced.
Isa isa();

}  // namespace fusedformer

#define FUSEDFORMER_JOIN_(name, isa) name##_##isa
#define FUSEDFORMER_JOIN(name, isa) FUSEDFORMER_JOIN_(name, isa)
#define FUSEDFORMER_NAME(name) FUSEDFORMER_JOIN(name, FUSEDFORMER_ISA)
// In the code of avx512bf16, the table that serves its CPU where that code is no better; in other
// code, its own.
#ifdef __AVX512BF16__
#define FUSEDFORMER_OTHERS(name) name##_avx512
#else
#define FUSEDFORMER_OTHERS(name) FUSEDFORMER_NAME(name)
#endif

// FUSEDFORMER_X86: the library holds all four; else the portable code alone.
#ifdef FUSEDFORMER_X86
#define FUSEDFORMER_TABLE(Table, name) \
  extern const Table name##_portable, name##_avx2, name##_avx512, name##_avx512bf16
#define FUSEDFORMER_PICK(name)                                                \
  (::fusedformer::isa() == ::fusedformer::Isa::avx512bf16 ? name##_avx512bf16 \
   : ::fusedformer::isa() == ::fusedformer::Isa::avx512   ? name##_avx512     \
   : ::fusedformer::isa() == ::fusedformer::Isa::avx2     ? name##_avx2       \
                                                          : name##_portable)
#else
#define FUSEDFORMER_TABLE(Table, name) extern const Table name##_portable
#define FUSEDFORMER_PICK(name) (name##_portable)
#endif
