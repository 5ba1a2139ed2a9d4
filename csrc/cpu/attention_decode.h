// Attention of one query to many keys, as decoding has it. What that costs is reading keys and
// values: each is read once, for all the heads of queries that share it, and the keys of a head are
// cut into parts, so that few heads use every core.
#pragma once

#include "attention.h"

namespace fusedformer {

// Keys of a part. It depends on nothing, so that no result depends on the number of threads.
constexpr int64_t kPartKeys = 256;

// What a part leaves of a head of queries: the largest score, the sum of the exponentials about it,
// and of these times the values, (D,).
constexpr int64_t part_size(int64_t dim) { return 2 + dim; }

struct AttentionDecodeKernels {
  // Keys first to last - 1 of a head of keys; `parts` of its queries' heads are `pitch` apart.
  void (*part)(const Attention&, int64_t b, int64_t key_head, int64_t first, int64_t last,
               float* parts, int64_t pitch);
  // O and LSE of a head of queries, of all its n parts.
  void (*merge)(const Attention&, int64_t b, int64_t h, float* parts, int64_t n);
};

FUSEDFORMER_TABLE(AttentionDecodeKernels, attention_decode_kernels);

// Whether attention_decode() is for a call.
inline bool decodes(const Attention& p) { return p.n_queries == 1 && !p.mask && !p.dropout; }

void attention_decode(const Attention& p);

}  // namespace fusedformer
