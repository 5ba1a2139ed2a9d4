// Entry points of the row-wise ops: torch.ops.fusedformer_native.<op>_fwd and <op>_bwd.
//
// Conventions of csrc/cpu, for every op:
//
// - An entry point takes tensors of the LibTorch stable ABI, allocates what it returns, cuts the
//   work into tasks for torch::stable::parallel_for and calls kernels on plain pointers. It trusts
//   what kernels/<op>.py checked. The public schemas are Python's, in the namespace fusedformer;
//   this one is private, so that no schema has two owners.
// - Kernels lie in *_kernels.cpp, which isa.h explains: compiled once for each instruction set,
//   no C++ library, no torch. New files are compiled by being there (kernels/native_build.py).
// - The cut into tasks depends on sizes alone, never on the number of threads, and what several
//   tasks add up is added in a fixed order: results are bitwise the same with any number of threads.
// - Only functions of TORCH_TARGET_VERSION 2.10 are used, so that one build runs on every torch
//   from 2.10 on. No OpenMP of our own: torch's thread pool alone.
