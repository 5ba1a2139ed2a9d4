// Attention on Hopper: what the launchers are given. No CUDA header is needed to read this.
#pragma once

#include <stdint.h>

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace fusedformer {
namespace hopper {

enum class DType { bfloat16, float16 };

// A (B, H, N, D) tensor in global memory: unit stride in D, the other strides in elements. TMA asks
// for strides that are multiples of 16 bytes and data on 16 bytes.
struct Tensor4 {
  void* data;
  int64_t batch, head, row;
};

struct Attention {
  int batches, heads, key_heads, n_queries, n_keys, dim;  // dim <= 256
  DType dtype;                // of query, key, value, out and their gradients
  Tensor4 query, key, value, out;
  float* lse;                 // (B, H, Nq), contiguous: natural log; -inf where a row sees no key
  const int32_t* key_lengths; // (B,), or null; clamped to 0 to Nk by the kernels
  int64_t diagonal;           // query i sees keys j <= i + diagonal; n_keys or more hides none
  float scale;
  const int64_t* seed;        // of dropout, read by the kernels; null: no dropout
  uint32_t threshold;         // a word below it drops its element
  float inverse_keep;         // 1 / (1 - p)
  int64_t offsets[4];         // of batch, head, query and key, in the dropout mask
  int* counter;               // one int of scratch, for the forward: how many tiles were taken
};

struct AttentionGrads {
  Tensor4 grad_out, grad_query, grad_key, grad_value;
  const float* grad_lse;      // (B, H, Nq), contiguous; or null
  bool deterministic;         // dQ is summed in one order, so that equal calls give equal bits
  void* workspace;            // attention_backward_workspace bytes, on 256 bytes; any content
};

// Launch on the stream and on the current device; nothing waits for it to end. No argument of a
// call that attention_unsupported (kernels/cuda/attention.py) takes is refused; a launch that fails
// throws std::runtime_error with CUDA's text.
void attention_forward(const Attention&, CUstream_st* stream);
void attention_backward(const Attention&, const AttentionGrads&, CUstream_st* stream);
int64_t attention_backward_workspace(const Attention&, bool deterministic);

}  // namespace hopper
}  // namespace fusedformer
