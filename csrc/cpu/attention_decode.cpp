// Attention of one query: its parts as tasks. See attention_decode.h.
#include "attention_decode.h"

#include <algorithm>
#include <vector>

#include "tasks.h"

namespace fusedformer {

void attention_decode(const Attention& p) {
  const AttentionDecodeKernels& kernels = FUSEDFORMER_PICK(attention_decode_kernels);
  const int64_t heads = p.batches * p.heads, key_heads = p.batches * p.key_heads;
  const int64_t most = std::max<int64_t>(1, (p.n_keys + kPartKeys - 1) / kPartKeys);
  const int64_t size = part_size(p.dim);
  std::vector<float> parts(heads * most * size);
  const auto parts_of = [&](int64_t head) { return parts.data() + head * most * size; };
  const auto count = [&](int64_t b) { return (p.key_end(b, 0) + kPartKeys - 1) / kPartKeys; };

  constexpr int64_t kWorthAThread = 128 << 10;
  const int64_t bytes = 2 * key_heads * p.n_keys * p.dim * bytes_of(p.dtype);
  run_tasks(key_heads * most, 1 + bytes / kWorthAThread, 0, [&](int64_t task, char*) {
    const int64_t head = task / most, part = task % most, b = head / p.key_heads;
    const int64_t first = part * kPartKeys;
    const int64_t last = std::min(p.key_end(b, 0), first + kPartKeys);
    if (first < last)
      kernels.part(p, b, head % p.key_heads, first, last,
                   parts_of(head * p.group()) + part * size, most * size);
  });
  for (int64_t head = 0; head < heads; ++head)
    kernels.merge(p, head / p.heads, head % p.heads, parts_of(head), count(head / p.heads));
}

}  // namespace fusedformer
