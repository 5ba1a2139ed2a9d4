// The random numbers of dropout, for host and device: the contract of kernels/rng.py in C++.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define FUSEDFORMER_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Internal to each file: the CPU's kernels files are compiled for several instruction sets.
#define FUSEDFORMER_HOST_DEVICE static inline
#endif

namespace fusedformer {
namespace philox {

constexpr int kRounds = 7;
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;

// One tag an op, so that two ops under one seed draw independent masks.
constexpr uint32_t kAttention = 1, kDropout = 2, kDropoutAddNorm = 3, kBiasActivation = 4;

// All 64 bits of a product. In PTX, as nvcc else multiplies by 64 bits wherever it knows that the
// upper 32 are zero, and adds the zeros.
FUSEDFORMER_HOST_DEVICE uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// Four words for one counter, in its place. Philox4x32 with 7 rounds (Salmon et al., SC 2011).
FUSEDFORMER_HOST_DEVICE void philox4x32(uint64_t seed, uint32_t counter[4]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = wide_product(kMultiplier0, counter[0]);
    const uint64_t product1 = wide_product(kMultiplier1, counter[2]);
    counter[0] = static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ k0;
    counter[1] = static_cast<uint32_t>(product1);
    counter[2] = static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ k1;
    counter[3] = static_cast<uint32_t>(product0);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
}

// Whether the element that takes byte 0 to 3 of a word is kept: the word is rotated, not shifted,
// so that each decision is a full 32-bit word.
FUSEDFORMER_HOST_DEVICE bool kept(uint32_t word, int byte, uint32_t threshold) {
  const uint32_t rotated = byte ? (word << 8 * byte) | (word >> (32 - 8 * byte)) : word;
  return rotated >= threshold;
}

// The counter of the call that decides columns 16 call to 16 call + 15 of a row, for the ops that
// work on rows. Of these 16, element e takes word e % 4 and byte e / 4.
FUSEDFORMER_HOST_DEVICE void rows_counter(uint64_t row, uint64_t call, uint32_t tag,
                                          uint32_t counter[4]) {
  counter[0] = static_cast<uint32_t>(call);
  counter[1] = static_cast<uint32_t>(row);
  counter[2] = (tag << 16) | static_cast<uint32_t>(row >> 32);
  counter[3] = static_cast<uint32_t>(call >> 32);
}

// The counter of the call that decides element (i, j) of attention: two neighbouring queries by
// two neighbouring keys, and their partners 8 further on. Element (i, j) takes word
// 2 (i % 2) + j % 2 and byte 2 (i / 8 % 2) + j / 8 % 2.
FUSEDFORMER_HOST_DEVICE void attention_counter(uint64_t batch, uint32_t head, uint64_t i,
                                               uint64_t j, uint32_t counter[4]) {
  counter[0] = static_cast<uint32_t>(i / 16 * 4 + i % 8 / 2);
  counter[1] = static_cast<uint32_t>(j / 16 * 4 + j % 8 / 2);
  counter[2] = (kAttention << 16) | head;
  counter[3] = static_cast<uint32_t>(batch);
}

}  // namespace philox
}  // namespace fusedformer
