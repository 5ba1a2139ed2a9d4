// Entry points of attention: torch.ops.fusedformer_native.attention_fwd and attention_bwd. Cuts the
// work into tasks; the kernels are in attention_forward.h and attention_backward.h. The conventions
// are those of ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <optional>
#include <thread>
#include <tuple>
#include <vector>

#include "attention.h"
#include "attention_decode.h"
#include "new_tensor.h"

namespace fusedformer {

void attention_wait(const int* counter, int value) {
  for (int spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) != value; ++spins)
    if (spins > 200) std::this_thread::yield();
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// --- Tasks ---------------------------------------------------------------------------------------

// Memory on cache lines.
class Memory {
 public:
  explicit Memory(size_t bytes)
      : data_(static_cast<char*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
};

// Each thread's scratch, which it keeps: less than 2 MB.
char* thread_scratch(size_t bytes) {
  static thread_local std::optional<Memory> memory;
  static thread_local size_t size = 0;
  if (!memory || size < bytes) {
    memory.emplace(bytes);
    size = bytes;
  }
  return memory->data();
}

// run(task, scratch) for every task, which threads take up in order as they get free. `work` is how
// many multiply-adds all are: a little is not worth waking other threads.
template <class Run>
void run_tasks(int64_t tasks, double work, size_t scratch_bytes, Run&& run) {
  constexpr double WORTH_A_THREAD = 1 << 20;
  int64_t workers = torch::stable::get_num_threads();
  if (workers > tasks) workers = tasks;
  const int64_t worth = 1 + static_cast<int64_t>(work / WORTH_A_THREAD);
  if (workers > worth) workers = worth;
  std::atomic<int64_t> next{0};
  const auto take = [&](int64_t, int64_t) {
    char* scratch = thread_scratch(scratch_bytes);
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      run(task, scratch);
  };
  if (workers <= 1)
    take(0, 1);
  else
    torch::stable::parallel_for(0, workers, 1, take);
}

// --- Arguments -----------------------------------------------------------------------------------

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    case ScalarType::Bool: return DType::boolean;
    default: STD_TORCH_CHECK(false, "attention: a dtype that the C++ kernels do not take");
  }
  return DType::float32;
}

// The kernels take any strides but that of D: such a tensor is copied.
Tensor readable(const Tensor& tensor) {
  return tensor.size(3) == 1 || tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Tensor4 view(const Tensor& tensor, const void* data) {
  const int64_t size = bytes_of(dtype_of(tensor));
  return {static_cast<char*>(const_cast<void*>(data)), tensor.stride(0) * size,
          tensor.stride(1) * size, tensor.stride(2) * size};
}
Tensor4 input(const Tensor& tensor) { return view(tensor, tensor.const_data_ptr()); }

// A fresh (B, H, N, D) tensor in (B, N, H, D) memory order.
Tensor new_bhnd(const Tensor& like) {
  const int64_t heads = like.size(1), length = like.size(2), dim = like.size(3);
  const int64_t sizes[] = {like.size(0), heads, length, dim};
  const int64_t strides[] = {length * heads * dim, dim, heads * dim, 1};
  return empty_strided(4, sizes, strides, like.scalar_type());
}
Tensor4 output(const Tensor& tensor) { return view(tensor, tensor.mutable_data_ptr()); }

// What the forward and the backward are given alike. Holds the copies it makes.
struct Call {
  Tensor query, key, value;
  Attention p;

  Call(const Tensor& query_, const Tensor& key_, const Tensor& value_,
       const std::optional<Tensor>& mask, const std::optional<Tensor>& key_lengths,
       int64_t diagonal, double scale, const std::optional<Tensor>& seed, int64_t threshold,
       double inverse_keep, int64_t batch_offset, int64_t head_offset, int64_t query_offset,
       int64_t key_offset)
      : query(readable(query_)), key(readable(key_)), value(readable(value_)), p{} {
    p.batches = query.size(0);
    p.heads = query.size(1);
    p.key_heads = key.size(1);
    p.n_queries = query.size(2);
    p.n_keys = key.size(2);
    p.dim = static_cast<int>(query.size(3));
    p.dtype = dtype_of(query);
    p.query = input(query);
    p.key = input(key);
    p.value = input(value);
    if (mask) {
      p.mask = static_cast<const char*>(mask->const_data_ptr());
      p.mask_dtype = dtype_of(*mask);
      for (int d = 0; d < 4; ++d)
        p.mask_strides[d] = mask->size(d) == 1 ? 0 : mask->stride(d) * bytes_of(p.mask_dtype);
    }
    if (key_lengths) p.key_lengths = static_cast<const int32_t*>(key_lengths->const_data_ptr());
    p.diagonal = diagonal;
    p.scale = static_cast<float>(scale);
    p.inverse_keep = 1;
    if (seed) {
      p.dropout = true;
      p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
      p.threshold = static_cast<uint32_t>(threshold);
      p.inverse_keep = static_cast<float>(inverse_keep);
    }
    const int64_t offsets[4] = {batch_offset, head_offset, query_offset, key_offset};
    for (int d = 0; d < 4; ++d) p.offsets[d] = offsets[d];
  }
};

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

std::tuple<Tensor, Tensor> attention_fwd(
    const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> mask,
    std::optional<Tensor> key_lengths, int64_t diagonal, double scale, std::optional<Tensor> seed,
    int64_t threshold, double inverse_keep, int64_t batch_offset, int64_t head_offset,
    int64_t query_offset, int64_t key_offset) {
  Call call(query, key, value, mask, key_lengths, diagonal, scale, seed, threshold, inverse_keep,
            batch_offset, head_offset, query_offset, key_offset);
  Attention& p = call.p;
  const Tensor out = new_bhnd(query);
  const int64_t lse_sizes[] = {p.batches, p.heads, p.n_queries};
  const int64_t lse_strides[] = {p.heads * p.n_queries, p.n_queries, 1};
  const Tensor lse = empty_strided(3, lse_sizes, lse_strides, ScalarType::Float);
  p.out = output(out);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (decodes(p)) {
    attention_decode(p);
    return {out, lse};
  }

  const auto& kernels =
      FUSEDFORMER_PICK_DTYPE(attention_forward_kernels, p.dtype == DType::bfloat16);
  // As many tiles at once as still leave every thread several tasks: no result depends on it.
  const int64_t heads = p.batches * p.heads, tiles = p.tiles();
  const int64_t fair = heads * tiles / (4 * static_cast<int64_t>(torch::stable::get_num_threads()));
  const int64_t at_once = fair < 1 ? 1 : fair < MAX_TILES ? fair : MAX_TILES;
  const int64_t parts = (tiles + at_once - 1) / at_once;
  run_tasks(heads * parts, 2 * work(p), kernels.scratch_bytes(p), [&](int64_t task, char* scratch) {
    // The last queries first: under a causal mask they take longest.
    const int64_t head = task / parts, first = (parts - 1 - task % parts) * at_once;
    const int64_t n = tiles - first < at_once ? tiles - first : at_once;
    kernels.forward(p, head / p.heads, head % p.heads, first, static_cast<int>(n), scratch);
  });
  return {out, lse};
}

// --- Backward ------------------------------------------------------------------------------------

// Some heads of keys at a time: every block of keys goes through all that is packed of its head's
// queries, which should stay in the cache meanwhile. One for each thread, or as many as fill a part
// of the cache; but no more than this much memory, if that leaves one.
constexpr size_t CACHED_BYTES = 8 << 20, MOST_BYTES = 32 << 20;

int64_t units_in_wave(size_t unit_bytes, int64_t units) {
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
  run_tasks(tiles, share, scratch, [&](int64_t task, char* memory) {
    const int64_t head = wave.first_unit * p.group() + task / p.tiles();
    kernels.prepare(p, g, head / p.heads, head % p.heads, task % p.tiles(),
                    wave.tiles + task * tile_bytes, memory);
    wave.done[task] = 0;
  });
  // Every unit's first block first: longest under a causal mask, and least to wait for.
  run_tasks(wave.n_units * p.blocks(), 5 * share, scratch, [&](int64_t task, char* memory) {
    kernels.key_block(p, g, wave, task % wave.n_units, task / wave.n_units, memory);
  });
}

void run_backward(const Attention& p, const AttentionGrads& g) {
  const auto& kernels =
      FUSEDFORMER_PICK_DTYPE(attention_backward_kernels, p.dtype == DType::bfloat16);
  const int64_t units = p.batches * p.key_heads, tiles_of_unit = p.group() * p.tiles();
  const size_t unit_bytes = tiles_of_unit * kernels.query_tile_bytes(p);
  const int64_t in_wave = units_in_wave(unit_bytes, units);
  const Memory tiles(in_wave * unit_bytes);
  std::vector<int> done(in_wave * tiles_of_unit);
  for (int64_t first = 0; first < units; first += in_wave) {
    const int64_t n = units - first < in_wave ? units - first : in_wave;
    run_wave(p, g, kernels, {first, n, tiles.data(), done.data()});
  }
}

void run_mask_grad(const Attention& p, const AttentionGrads& g) {
  const auto& kernels = FUSEDFORMER_PICK_DTYPE(attention_backward_kernels, false);
  run_tasks(mask_grad_tasks(p, g), 2 * work(p), kernels.scratch_bytes(p),
            [&](int64_t task, char* scratch) { kernels.mask_grad(p, g, task, scratch); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& grad_out, std::optional<Tensor> grad_lse, const Tensor& out, const Tensor& lse,
    bool mask_grad, const Tensor& query, const Tensor& key, const Tensor& value,
    std::optional<Tensor> mask, std::optional<Tensor> key_lengths, int64_t diagonal, double scale,
    std::optional<Tensor> seed, int64_t threshold, double inverse_keep, int64_t batch_offset,
    int64_t head_offset, int64_t query_offset, int64_t key_offset) {
  Call call(query, key, value, mask, key_lengths, diagonal, scale, seed, threshold, inverse_keep,
            batch_offset, head_offset, query_offset, key_offset);
  Attention& p = call.p;
  const Tensor readable_out = readable(out), readable_grad_out = readable(grad_out);
  const Tensor dense_lse = torch::stable::contiguous(lse);
  p.out = input(readable_out);
  p.lse = static_cast<float*>(const_cast<void*>(dense_lse.const_data_ptr()));
  std::optional<Tensor> dense_grad_lse;
  if (grad_lse) dense_grad_lse = torch::stable::contiguous(*grad_lse);

  const Tensor grad_query = new_bhnd(query), grad_key = new_bhnd(key), grad_value = new_bhnd(value);
  AttentionGrads g = {};
  g.grad_out = input(readable_grad_out);
  g.grad_query = output(grad_query);
  g.grad_key = output(grad_key);
  g.grad_value = output(grad_value);
  if (dense_grad_lse) g.grad_lse = static_cast<const float*>(dense_grad_lse->const_data_ptr());
  run_backward(p, g);

  const int64_t none[] = {0}, one[] = {1};
  const Tensor grad_mask = mask && mask_grad
                               ? torch::stable::new_empty(*mask, mask->sizes())
                               : empty_strided(1, none, one, query.scalar_type());
  if (mask && mask_grad) {
    g.grad_mask = static_cast<char*>(grad_mask.mutable_data_ptr());
    for (int d = 0; d < 4; ++d) g.mask_sizes[d] = mask->size(d);
    run_mask_grad(p, g);
  }
  return {grad_query, grad_key, grad_value, grad_mask};
}

}  // namespace
}  // namespace fusedformer

// Those after the scale are dropout's. A call without it leaves them out, for each that is passed
// costs a small call time.
#define FUSEDFORMER_ATTENTION_ARGUMENTS                                                 \
  "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? key_lengths, "         \
  "int diagonal, float scale, Tensor? seed=None, int threshold=0, float inverse_keep=1, " \
  "int batch_offset=0, int head_offset=0, int query_offset=0, int key_offset=0"

STABLE_TORCH_LIBRARY_FRAGMENT(fusedformer_native, m) {
  m.def("attention_fwd(" FUSEDFORMER_ATTENTION_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, "
        "bool mask_grad, " FUSEDFORMER_ATTENTION_ARGUMENTS ") -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_native, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&fusedformer::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&fusedformer::attention_bwd));
}
