// Entry points of attention: torch.ops.fusedformer_native.attention_fwd and attention_bwd, and for
// calls without options attention_plain*. Cuts the work into tasks; the kernels are in
// attention_forward.h and attention_backward.h. The conventions are those of ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <thread>
#include <tuple>
#include <vector>

#include "attention_call.h"
#include "attention_decode.h"
#include "tasks.h"
#include "tensors.h"

namespace fusedformer {

void attention_wait(const int* counter, int value) {
  for (int spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) != value; ++spins)
    if (spins > 200) std::this_thread::yield();
}

namespace {

// --- Tasks ---------------------------------------------------------------------------------------

constexpr double WORTH_A_THREAD = 1 << 20;  // in multiply-adds: less is not worth waking one

int64_t threads_for(double work) { return 1 + static_cast<int64_t>(work / WORTH_A_THREAD); }

// Multiply-adds of one product of all queries with all keys.
double work(const Attention& p) {
  return static_cast<double>(p.batches) * p.heads * p.n_queries * p.n_keys * p.dim;
}

// See attention.h: what serves a CPU with bfloat16 dot products for the other dtypes.
#ifdef FUSEDFORMER_X86
#define FUSEDFORMER_PICK_DTYPE(table, bfloat16)                                       \
  (isa() != Isa::avx512bf16 ? FUSEDFORMER_PICK(table) : (bfloat16) ? table##_avx512bf16 \
                                                                   : table##_avx512)
#else
#define FUSEDFORMER_PICK_DTYPE(table, bfloat16) FUSEDFORMER_PICK(table)
#endif

// --- Forward -------------------------------------------------------------------------------------

void run_forward(const Attention& p) {
  if (decodes(p)) return attention_decode(p);
  const auto& kernels =
      FUSEDFORMER_PICK_DTYPE(attention_forward_kernels, p.dtype == DType::bfloat16);
  // As many tiles at once as still leave every thread several tasks: no result depends on it.
  const int64_t heads = p.batches * p.heads, tiles = p.tiles();
  const int64_t fair = heads * tiles / (4 * static_cast<int64_t>(torch::stable::get_num_threads()));
  const int64_t at_once = fair < 1 ? 1 : fair < MAX_TILES ? fair : MAX_TILES;
  const int64_t parts = (tiles + at_once - 1) / at_once;
  const int64_t threads = threads_for(2 * work(p));
  run_tasks(heads * parts, threads, kernels.scratch_bytes(p), [&](int64_t task, char* scratch) {
    // The last queries first: under a causal mask they take longest.
    const int64_t head = task / parts, first = (parts - 1 - task % parts) * at_once;
    const int64_t n = tiles - first < at_once ? tiles - first : at_once;
    kernels.forward(p, head / p.heads, head % p.heads, first, static_cast<int>(n), scratch);
  });
}

std::tuple<Tensor, Tensor> forward(Call& call) {
  Attention& p = call.p;
  const Tensor out = new_bhnd(call.query);
  const int64_t lse_sizes[] = {p.batches, p.heads, p.n_queries};
  const int64_t lse_strides[] = {p.heads * p.n_queries, p.n_queries, 1};
  const Tensor lse = empty_strided(3, lse_sizes, lse_strides, ScalarType::Float);
  p.out = output(out);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  run_forward(p);
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention_fwd(
    const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> mask,
    std::optional<Tensor> key_lengths, int64_t diagonal, double scale, std::optional<Tensor> seed,
    int64_t threshold, double inverse_keep, int64_t batch_offset, int64_t head_offset,
    int64_t query_offset, int64_t key_offset) {
  Call call(query, key, value, mask, key_lengths, diagonal, scale, seed, threshold, inverse_keep,
            batch_offset, head_offset, query_offset, key_offset);
  return forward(call);
}

// O alone, of calls without options, which are checked here: for small ones, that takes less time
// than anywhere else. Nothing where the call is not usual().
std::optional<Tensor> attention_plain(const Tensor& query, const Tensor& key, const Tensor& value,
                                      bool causal, std::optional<double> scale) {
  if (!usual(query, key, value, scale)) return std::nullopt;
  Call call = plain_call(query, key, value, causal, scale);
  const Tensor out = new_bhnd(query);
  call.p.out = output(out);
  run_forward(call.p);
  return out;
}

// The same with the LSE.
std::tuple<std::optional<Tensor>, std::optional<Tensor>> attention_plain_fwd(
    const Tensor& query, const Tensor& key, const Tensor& value, bool causal,
    std::optional<double> scale) {
  if (!usual(query, key, value, scale)) return {std::nullopt, std::nullopt};
  Call call = plain_call(query, key, value, causal, scale);
  const auto [out, lse] = forward(call);
  return {out, lse};
}

// --- Backward ------------------------------------------------------------------------------------

// Some heads of keys at a time: every block of keys goes through all that is packed of its head's
// queries, which should stay in the cache meanwhile. One for each thread, or as many as fill a part
// of the cache; but no more than this much memory, if that leaves one.
constexpr size_t CACHED_BYTES = 8 << 20, MOST_BYTES = 32 << 20;

int64_t units_in_wave(size_t unit_bytes, int64_t units, double work) {
  if (work < WORTH_A_THREAD) return 1;  // one thread: what it packs, it uses at once
  const int64_t cached = static_cast<int64_t>(CACHED_BYTES / unit_bytes);
  const int64_t most = static_cast<int64_t>(MOST_BYTES / unit_bytes);
  int64_t wanted = torch::stable::get_num_threads();
  if (wanted < cached) wanted = cached;
  if (wanted > most) wanted = most < 1 ? 1 : most;
  const int64_t waves = (units + wanted - 1) / wanted;
  return (units + waves - 1) / waves;
}

void run_wave(const Attention& p, const AttentionGrads& g, const AttentionBackwardKernels& kernels,
              AttentionWave wave) {
  const int64_t tiles = wave.n_units * p.group() * p.tiles();
  const size_t tile_bytes = kernels.query_tile_bytes(p), scratch = kernels.scratch_bytes(p);
  const double share = work(p) * wave.n_units / (p.batches * p.key_heads);
  run_tasks(tiles, threads_for(share), scratch, [&](int64_t task, char* memory) {
    const int64_t head = wave.first_unit * p.group() + task / p.tiles();
    kernels.prepare(p, g, head / p.heads, head % p.heads, task % p.tiles(),
                    wave.tiles + task * tile_bytes, memory);
    wave.done[task] = 0;
  });
  // Every unit's first block first: longest under a causal mask, and least to wait for.
  const int64_t threads = threads_for(5 * share);
  run_tasks(wave.n_units * p.blocks(), threads, scratch, [&](int64_t task, char* memory) {
    kernels.key_block(p, g, wave, task % wave.n_units, task / wave.n_units, memory);
  });
}

void run_backward(const Attention& p, const AttentionGrads& g) {
  const auto& kernels =
      FUSEDFORMER_PICK_DTYPE(attention_backward_kernels, p.dtype == DType::bfloat16);
  const int64_t units = p.batches * p.key_heads, tiles_of_unit = p.group() * p.tiles();
  const size_t unit_bytes = tiles_of_unit * kernels.query_tile_bytes(p);
  const int64_t in_wave = units_in_wave(unit_bytes, units, 5 * work(p));
  const Scratch<char> tiles(in_wave * unit_bytes);
  std::vector<int> done(in_wave * tiles_of_unit);
  for (int64_t first = 0; first < units; first += in_wave) {
    const int64_t n = units - first < in_wave ? units - first : in_wave;
    run_wave(p, g, kernels, {first, n, tiles.data(), done.data()});
  }
}

void run_mask_grad(const Attention& p, const AttentionGrads& g) {
  const auto& kernels = FUSEDFORMER_PICK_DTYPE(attention_backward_kernels, false);
  run_tasks(mask_grad_tasks(p, g), threads_for(2 * work(p)), kernels.scratch_bytes(p),
            [&](int64_t task, char* scratch) { kernels.mask_grad(p, g, task, scratch); });
}

Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// dQ, dK and dV, made by the constructor. Holds the copies that it makes.
struct Gradients {
  Tensor out, grad_out, lse;
  std::optional<Tensor> grad_lse;
  Tensor query, key, value;
  AttentionGrads g{};

  Gradients(Call& call, const Tensor& grad_out_, const std::optional<Tensor>& grad_lse_,
            const Tensor& out_, const Tensor& lse_)
      : out(readable(out_)), grad_out(readable(grad_out_)), lse(dense(lse_)),
        query(new_bhnd(call.query)), key(new_bhnd(call.key)), value(new_bhnd(call.value)) {
    call.p.out = input(out);
    call.p.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
    g.grad_out = input(grad_out);
    g.grad_query = output(query);
    g.grad_key = output(key);
    g.grad_value = output(value);
    if (grad_lse_) {
      grad_lse = dense(*grad_lse_);
      g.grad_lse = static_cast<const float*>(grad_lse->const_data_ptr());
    }
    run_backward(call.p, g);
  }
};

std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>> attention_bwd(
    const Tensor& grad_out, std::optional<Tensor> grad_lse, const Tensor& out, const Tensor& lse,
    bool mask_grad, const Tensor& query, const Tensor& key, const Tensor& value,
    std::optional<Tensor> mask, std::optional<Tensor> key_lengths, int64_t diagonal, double scale,
    std::optional<Tensor> seed, int64_t threshold, double inverse_keep, int64_t batch_offset,
    int64_t head_offset, int64_t query_offset, int64_t key_offset) {
  Call call(query, key, value, mask, key_lengths, diagonal, scale, seed, threshold, inverse_keep,
            batch_offset, head_offset, query_offset, key_offset);
  Gradients grads(call, grad_out, grad_lse, out, lse);
  std::optional<Tensor> grad_mask;
  if (mask && mask_grad) {
    grad_mask = torch::stable::new_empty(*mask, mask->sizes());
    grads.g.grad_mask = static_cast<char*>(grad_mask->mutable_data_ptr());
    for (int d = 0; d < 4; ++d) grads.g.mask_sizes[d] = mask->size(d);
    run_mask_grad(call.p, grads.g);
  }
  return {grads.query, grads.key, grads.value, grad_mask};
}

// Of attention_plain_fwd, by whose word the call is usual().
std::tuple<Tensor, Tensor, Tensor> attention_plain_bwd(
    const Tensor& grad_out, const Tensor& out, const Tensor& lse, const Tensor& query,
    const Tensor& key, const Tensor& value, bool causal, std::optional<double> scale) {
  Call call = plain_call(query, key, value, causal, scale);
  const Gradients grads(call, grad_out, std::nullopt, out, lse);
  return {grads.query, grads.key, grads.value};
}

}  // namespace
}  // namespace fusedformer

// Those after the scale are dropout's. A call without it leaves them out, for each that is passed
// costs a small call time.
#define FUSEDFORMER_ATTENTION_ARGUMENTS                                                 \
  "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? key_lengths, "         \
  "int diagonal, float scale, Tensor? seed=None, int threshold=0, float inverse_keep=1, " \
  "int batch_offset=0, int head_offset=0, int query_offset=0, int key_offset=0"
#define FUSEDFORMER_PLAIN_ARGUMENTS \
  "Tensor query, Tensor key, Tensor value, bool causal=False, float? scale=None"

STABLE_TORCH_LIBRARY_FRAGMENT(fusedformer_native, m) {
  m.def("attention_fwd(" FUSEDFORMER_ATTENTION_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, "
        "bool mask_grad, " FUSEDFORMER_ATTENTION_ARGUMENTS
        ") -> (Tensor, Tensor, Tensor, Tensor?)");
  m.def("attention_plain(" FUSEDFORMER_PLAIN_ARGUMENTS ") -> Tensor?");
  m.def("attention_plain_fwd(" FUSEDFORMER_PLAIN_ARGUMENTS ") -> (Tensor?, Tensor?)");
  m.def("attention_plain_bwd(Tensor grad_out, Tensor out, Tensor lse, " FUSEDFORMER_PLAIN_ARGUMENTS
        ") -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_native, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&fusedformer::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&fusedformer::attention_bwd));
  m.impl("attention_plain", TORCH_BOX(&fusedformer::attention_plain));
  m.impl("attention_plain_fwd", TORCH_BOX(&fusedformer::attention_plain_fwd));
  m.impl("attention_plain_bwd", TORCH_BOX(&fusedformer::attention_plain_bwd));
}
