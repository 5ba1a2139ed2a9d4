// The backward of attention: FlashAttention-2 (Dao 2023), algorithm 2, with one block of keys after
// another in the outer loop and tiles of queries in the inner one.
//
// S^T and dP^T are computed a few rows of keys at a time, queries in the lanes as in the forward,
// so that P and dS are formed in registers; P^T and dS^T then are operands of three more products:
//   dV += P^T dO,   dK += dS^T Q   (A from these rows; dO and Q with D in the lanes)
//   dQ^T += K^T dS^T               (B from these rows)
// Blocks of keys run in parallel. A block adds to a tile's dQ when the one before it has: blocks go
// through the tiles in the same order, one behind the other, and the sum has a fixed order.
#pragma once

#include "attention_mask.h"
#include "attention_random.h"

namespace fusedformer {
namespace {

// A packed tile of queries: computed once, used by every block of keys.
struct QueryTile {
  float* query;       // (words of D, TILE), its sign that of the scale
  float* grad_out;    // (words of D, TILE)
  float* query_steps;     // (TILE / PER_WORD, D padded)
  float* grad_out_steps;  // likewise
  float* lse;         // (TILE,), in the unit of the exponents; a weight of 0 for what is not there
  float* shift;       // (TILE,): minus (rowsum(dO o O) - dLSE)
  float* grad_query;  // (D, TILE): the sum over blocks so far

  template <class Math>
  static QueryTile take(Math, int dim, Arena& arena) {
    const size_t words = rounded_up(Pack<Math>::words(dim), LANES), width = rounded_up(dim, LANES);
    QueryTile tile;
    tile.query = arena.take<float>(words * TILE);
    tile.grad_out = arena.take<float>(words * TILE);
    tile.query_steps = arena.take<float>(width * TILE / Math::PER_WORD);
    tile.grad_out_steps = arena.take<float>(width * TILE / Math::PER_WORD);
    tile.lse = arena.take<float>(TILE);
    tile.shift = arena.take<float>(TILE);
    tile.grad_query = arena.take<float>(width * TILE);
    return tile;
  }
};

struct BackwardScratch {
  float *keys, *values;     // (BLOCK, words of D)
  float* key_steps;         // (BLOCK / PER_WORD, D padded)
  float *grad_key, *grad_value;  // (BLOCK, D padded)
  float *weights, *grads;   // P^T and dS^T as A: (BLOCK, TILE / PER_WORD)
  float* grad_steps;        // dS^T as B: (BLOCK / PER_WORD, TILE)
  float *bias, *rows;
  uint8_t* kept;

  BackwardScratch(const Attention& p, Arena& arena) {
    const size_t width = rounded_up(p.dim, LANES);
    keys = arena.take<float>(BLOCK * width);
    values = arena.take<float>(BLOCK * width);
    key_steps = arena.take<float>(BLOCK * width);
    grad_key = arena.take<float>(BLOCK * width);
    grad_value = arena.take<float>(BLOCK * width);
    weights = arena.take<float>(BLOCK * TILE);
    grads = arena.take<float>(BLOCK * TILE);
    grad_steps = arena.take<float>(BLOCK * TILE);
    bias = arena.take<float>((BLOCK + LANES) * TILE);
    rows = arena.take<float>(TILE * (width > BLOCK ? width : BLOCK));
    kept = arena.take<uint8_t>(BLOCK * TILE / 8);
  }
};

template <class Math>
size_t query_tile_bytes(const Attention& p) {
  Arena arena = {nullptr};
  QueryTile::take(Math{}, p.dim, arena);
  return arena.used;
}

// --- A tile of queries ---------------------------------------------------------------------------

inline int queries_of(const Attention& p, int64_t tile) {
  const int64_t left = p.n_queries - tile * TILE;
  return static_cast<int>(left < TILE ? left : TILE);
}

// a . b of one row, the sums of every LANES-th element each in a lane.
inline Vec row_product(DType dtype, const char* a, const char* b, int dim) {
  const int size = bytes_of(dtype);
  Vec sum = zero();
  int d = 0;
  for (; d + LANES <= dim; d += LANES)
    sum = fma(load_as(dtype, a + d * size), load_as(dtype, b + d * size), sum);
  if (d == dim) return sum;
  alignas(64) float last_a[LANES] = {}, last_b[LANES] = {};
  to_floats(dtype, a + d * size, size, dim - d, last_a);
  to_floats(dtype, b + d * size, size, dim - d, last_b);
  return fma(load(last_a), load(last_b), sum);
}

// to[i] = dO . O of row i, for n rows and the lanes after them. Rows are added up side by side.
inline void row_products(DType dtype, const char* grad_out, ptrdiff_t grad_stride, const char* out,
                         ptrdiff_t out_stride, int n, int dim, float* to) {
  alignas(64) float rows[LANES * LANES] = {}, columns[LANES * LANES];
  for (int first = 0; first < n; first += LANES) {
    const int some = n - first < LANES ? n - first : LANES;
    for (int row = 0; row < some; ++row)
      store(rows + row * LANES, row_product(dtype, grad_out + (first + row) * grad_stride,
                                            out + (first + row) * out_stride, dim));
    transpose(rows, LANES, columns, LANES);
    for (int half = LANES / 2; half; half /= 2)
      for (int lane = 0; lane < half; ++lane)
        store(columns + lane * LANES,
              add(load(columns + lane * LANES), load(columns + (lane + half) * LANES)));
    store(to + first, load(columns));
  }
}

inline void write_zeros(const Tensor4& t, int64_t b, int64_t h, int64_t first, int64_t end,
                        int bytes) {
  for (int64_t row = first; row < end; ++row) __builtin_memset(t.at(b, h, row), 0, bytes);
}

template <class Math>
void prepare(const Attention& p, const AttentionGrads& g, int64_t b, int64_t h, int64_t tile,
             char* packed, char* scratch) {
  Arena own = {packed}, arena = {scratch};
  const QueryTile t = QueryTile::take(Math{}, p.dim, own);
  BackwardScratch s(p, arena);
  const int64_t first = tile * TILE;
  const int n = queries_of(p, tile), width = rounded_up(p.dim, LANES);
  const char *query = p.query.at(b, h, first), *grad_out = g.grad_out.at(b, h, first);

  pack_columns<Math>(p.dtype, query, p.query.row, n, p.dim, s.rows, t.query);
  if (p.scale < 0) flip_signs(t.query, Pack<Math>::words(p.dim) * TILE, Math::SIGNS);
  pack_columns<Math>(p.dtype, grad_out, g.grad_out.row, n, p.dim, s.rows, t.grad_out);
  // Steps beyond the last query have weights of 0, and must not be NaN.
  const int filled = rounded_up(n, LANES), steps = (n + Math::PER_WORD - 1) / Math::PER_WORD;
  const size_t left = sizeof(float) * width * (filled / Math::PER_WORD - steps);
  __builtin_memset(t.query_steps + steps * width, 0, left);
  __builtin_memset(t.grad_out_steps + steps * width, 0, left);
  Pack<Math>::steps(p.dtype, query, p.query.row, n, p.dim, t.query_steps, width);
  Pack<Math>::steps(p.dtype, grad_out, g.grad_out.row, n, p.dim, t.grad_out_steps, width);

  const int64_t at = (b * p.heads + h) * p.n_queries + first;
  clear_columns(t.grad_query, p.dim, filled);
  alignas(64) float products[TILE];
  row_products(p.dtype, grad_out, g.grad_out.row, p.out.at(b, h, first), p.out.row, n, p.dim,
               products);
  fill(t.lse, TILE, LSE_OF_NOTHING);
  fill(t.shift, TILE, 0);
  for (int i = 0; i < n; ++i) {
    const float lse = p.lse[at + i];
    if (lse == -__builtin_inff()) continue;  // nothing to attend to
    t.lse[i] = lse * Math::UNIT;
    t.shift[i] = (g.grad_lse ? g.grad_lse[at + i] : 0) - products[i];
  }
  if (p.key_end(b, tile) == 0)  // no block of keys will come by
    write_zeros(g.grad_query, b, h, first, first + n, p.dim * bytes_of(p.dtype));
}

// --- P and dS ------------------------------------------------------------------------------------

// What one tile of scores needs.
struct Scores {
  const float *keys, *values;
  const float* bias;    // or null
  const uint8_t* kept;  // or null
  int rows;             // keys
};

inline Scores scores_of(const Attention& p, int64_t b, int64_t h, int64_t tile, int64_t first_key,
                        int rows, BackwardScratch& s) {
  const int n = queries_of(p, tile);
  Scores scores = {s.keys, s.values, nullptr, nullptr, rows};
  scores.bias = bias_tile(p, b, h, tile * TILE, n, first_key, rows, s.rows, s.bias);
  if (p.dropout) {
    kept_block(p, b, h, tile * TILE, n, first_key, rows, s.kept);
    scores.kept = s.kept;
  }
  return scores;
}

// sink(row, P, dS) for R rows of keys at a time and C vectors of queries. P holds 0 for what is
// dropped, and lacks the factor 1 / (1 - p).
template <class Math, int C, class Sink>
FUSEDFORMER_INLINE void score_grads(const Attention& p, const QueryTile& t, const Scores& s, int v,
                                    Sink&& sink) {
  const int words = Pack<Math>::words(p.dim), at = v * LANES;
  const StepsInRows keys = {reinterpret_cast<const char*>(s.keys), 4 * words};
  const StepsInRows values = {reinterpret_cast<const char*>(s.values), 4 * words};
  const Vec scale = set(__builtin_fabsf(p.scale)), inverse_keep = set(p.inverse_keep);
  const Vec factor = set(s.bias ? Math::UNIT : __builtin_fabsf(p.scale) * Math::UNIT);
  each_strip<rows_of<C>()>(0, s.rows, [&](auto height, int row) FUSEDFORMER_LAMBDA {
    constexpr int R = decltype(height)::value;
    alignas(64) float weights[R * C * LANES];
    product_tile<Math, R, C>(
        words, keys.from(row), t.query + at, TILE, [&](Vec(&sums)[R][C]) FUSEDFORMER_LAMBDA {
          if (s.bias) {
            FUSEDFORMER_UNROLL for (int r = 0; r < R; ++r)
              FUSEDFORMER_UNROLL for (int c = 0; c < C; ++c)
                sums[r][c] =
                    fma(sums[r][c], scale, load(s.bias + (row + r) * TILE + at + c * LANES));
          }
          FUSEDFORMER_UNROLL for (int r = 0; r < R; ++r)
            FUSEDFORMER_UNROLL for (int c = 0; c < C; ++c)
              store(weights + (r * C + c) * LANES,
                    Math::exp(fms(sums[r][c], factor, load(t.lse + at + c * LANES))));
        });
    product_tile<Math, R, C>(
        words, values.from(row), t.grad_out + at, TILE, [&](Vec(&sums)[R][C]) FUSEDFORMER_LAMBDA {
          Vec p_rows[R][C];
          FUSEDFORMER_UNROLL for (int r = 0; r < R; ++r)
            FUSEDFORMER_UNROLL for (int c = 0; c < C; ++c) {
              const Vec weight = load(weights + (r * C + c) * LANES);
              const Vec shift = load(t.shift + at + c * LANES);
              if (s.kept) {
                const Lanes kept = lanes(s.kept + 8 * (row + r), v + c);
                sums[r][c] = mul(weight, fma_where(kept, sums[r][c], inverse_keep, shift));
                p_rows[r][c] = where(kept, weight);
              } else {
                sums[r][c] = mul(weight, add(sums[r][c], shift));
                p_rows[r][c] = weight;
              }
            }
          sink(row, p_rows, sums);
        });
  });
}

// A strip of P^T or dS^T as rows of A: words along the queries. `to` is that of the first vector.
template <int R, int C>
FUSEDFORMER_INLINE void store_rows(Float32, const Vec (&strip)[R][C], int row, int v, float* to) {
  FUSEDFORMER_UNROLL for (int r = 0; r < R; ++r)
    FUSEDFORMER_UNROLL for (int c = 0; c < C; ++c)
      store(to + (row + r) * TILE + (v + c) * LANES, strip[r][c]);
}

// dS^T as B: words along the keys.
template <int R, int C>
FUSEDFORMER_INLINE void store_steps(Float32, const Vec (&)[R][C], int, int, float*) {}

#ifdef __AVX512BF16__
template <int R, int C>
FUSEDFORMER_INLINE void store_rows(Bfloat16, const Vec (&strip)[R][C], int row, int v, float* to) {
  FUSEDFORMER_UNROLL for (int r = 0; r < R; ++r)
    FUSEDFORMER_UNROLL for (int c = 0; c < C; c += 2) {
      float* at = to + ((row + r) * TILE + (v + c) * LANES) / 2;
      if constexpr (C == 1)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at),
                            (__m256i)_mm512_cvtneps_pbh(strip[r][c]));
      else
        store(at, (Vec)_mm512_cvtne2ps_pbh(strip[r][c + 1 < C ? c + 1 : c], strip[r][c]));
    }
}

template <int R, int C>
FUSEDFORMER_INLINE void store_steps(Bfloat16, const Vec (&strip)[R][C], int row, int v, float* to) {
  FUSEDFORMER_UNROLL for (int r = 0; r < R; r += 2)
    FUSEDFORMER_UNROLL for (int c = 0; c < C; ++c)
      store(to + (row + r) / 2 * TILE + (v + c) * LANES,
            pair(strip[r][c], r + 1 < R ? strip[r + 1 < R ? r + 1 : r][c] : zero()));
}
#endif

// --- A block of keys -----------------------------------------------------------------------------

template <class Math>
void pack_block(const Attention& p, int64_t b, int64_t h, int64_t first, int n,
                BackwardScratch& s) {
  const int words = Pack<Math>::words(p.dim), width = rounded_up(p.dim, LANES);
  const char *keys = p.key.at(b, h, first), *values = p.value.at(b, h, first);
  Pack<Math>::rows(p.dtype, keys, p.key.row, n, p.dim, s.keys, words);
  Pack<Math>::rows(p.dtype, values, p.value.row, n, p.dim, s.values, words);
  if (Math::PER_WORD == 1 && words == width)
    s.key_steps = s.keys;  // which are laid out alike
  else
    Pack<Math>::steps(p.dtype, keys, p.key.row, n, p.dim, s.key_steps, width);
}

// P^T and dS^T of a tile of queries and the packed block, into the scratch.
template <class Math>
void score_grads_tile(const Attention& p, const QueryTile& t, const Scores& scores, int vectors,
                      BackwardScratch& s) {
  each_panel(vectors, [&](auto size, int v) FUSEDFORMER_LAMBDA {
    constexpr int C = decltype(size)::value;
    score_grads<Math, C>(
        p, t, scores, v, [&](int row, auto& weights, auto& grads) FUSEDFORMER_LAMBDA {
          store_rows(Math{}, weights, row, v, s.weights);
          store_rows(Math{}, grads, row, v, s.grads);
          store_steps(Math{}, grads, row, v, s.grad_steps);
        });
  });
}

// Adds to dK and dV what one tile of queries gives; leaves dS^T for dQ.
template <class Math>
void key_value_grads(const Attention& p, const QueryTile& t, const Scores& scores, int queries,
                     BackwardScratch& s) {
  constexpr int PER = Math::PER_WORD;
  const int vectors = (queries + LANES - 1) / LANES, width = rounded_up(p.dim, LANES);
  score_grads_tile<Math>(p, t, scores, vectors, s);
  const int steps = vectors * LANES / PER;
  const ptrdiff_t stride = sizeof(float) * TILE / PER;
  product<Math, false>(scores.rows, steps, width / LANES,
                             StepsInRows{reinterpret_cast<char*>(s.weights), stride},
                             t.grad_out_steps, width, s.grad_value, width);
  product<Math, false>(scores.rows, steps, width / LANES,
                             StepsInRows{reinterpret_cast<char*>(s.grads), stride}, t.query_steps,
                             width, s.grad_key, width);
}

// dQ^T of a tile, plus what this block gives; the last block writes it out.
template <class Math>
void query_grads(const Attention& p, const AttentionGrads& g, const QueryTile& t, int64_t b,
                 int64_t h, int64_t tile, int64_t block, int rows, int* done, BackwardScratch& s) {
  const int queries = queries_of(p, tile), vectors = (queries + LANES - 1) / LANES;
  const int steps = (rows + Math::PER_WORD - 1) / Math::PER_WORD;
  const RowsInSteps keys = {reinterpret_cast<char*>(s.key_steps), 4 * rounded_up(p.dim, LANES)};
  const float* grads = Math::PER_WORD == 1 ? s.grads : s.grad_steps;
  attention_wait(done, static_cast<int>(block));
  product<Math, false>(p.dim, steps, vectors, keys, grads, TILE, t.grad_query, TILE);
  if ((block + 1) * BLOCK >= p.key_end(b, tile))
    store_columns(t.grad_query, [&](int) { return p.scale; }, queries, p.dim, s.rows, p.dtype,
                  g.grad_query.at(b, h, tile * TILE), g.grad_query.row);
  __atomic_store_n(done, static_cast<int>(block + 1), __ATOMIC_RELEASE);
}

template <class Math>
void key_block(const Attention& p, const AttentionGrads& g, const AttentionWave& wave, int64_t unit,
               int64_t block, char* scratch) {
  Arena arena = {scratch};
  BackwardScratch s(p, arena);
  const int64_t b = (wave.first_unit + unit) / p.key_heads;
  const int64_t kh = (wave.first_unit + unit) % p.key_heads;
  const int64_t first = block * BLOCK, length = p.key_length(b);
  const int64_t end = first + BLOCK < p.n_keys ? first + BLOCK : p.n_keys;
  const int n = static_cast<int>(length <= first ? 0 : (length < end ? length : end) - first);
  const int width = rounded_up(p.dim, LANES), size = bytes_of(p.dtype);
  const size_t tile_bytes = query_tile_bytes<Math>(p);
  pack_block<Math>(p, b, kh, first, n, s);
  fill(s.grad_key, n * width, 0);
  fill(s.grad_value, n * width, 0);
  // The first tile of which some query sees the block's first key.
  const int64_t before = first - p.diagonal;
  const int64_t first_tile = before > 0 ? before / TILE : 0;
  for (int64_t member = 0; n > 0 && member < p.group(); ++member) {
    const int64_t h = kh * p.group() + member, base = (unit * p.group() + member) * p.tiles();
    for (int64_t tile = first_tile; tile < p.tiles(); ++tile) {
      const int64_t seen = p.key_end(b, tile) - first;
      if (seen <= 0) continue;
      const int rows = static_cast<int>(seen < n ? seen : n);
      Arena packed = {wave.tiles + (base + tile) * tile_bytes};
      const QueryTile t = QueryTile::take(Math{}, p.dim, packed);
      const Scores scores = scores_of(p, b, h, tile, first, rows, s);
      key_value_grads<Math>(p, t, scores, queries_of(p, tile), s);
      query_grads<Math>(p, g, t, b, h, tile, block, rows, wave.done + base + tile, s);
    }
  }
  for (int row = 0; row < n; ++row) {
    from_floats(p.dtype, s.grad_key + row * width, p.scale, p.dim,
                g.grad_key.at(b, kh, first + row));
    from_floats(p.dtype, s.grad_value + row * width, p.inverse_keep, p.dim,
                g.grad_value.at(b, kh, first + row));
  }
  write_zeros(g.grad_key, b, kh, first + n, end, p.dim * size);
  write_zeros(g.grad_value, b, kh, first + n, end, p.dim * size);
}

template <class Math>
size_t backward_scratch(const Attention& p) {
  Arena arena = {nullptr};
  BackwardScratch counted(p, arena);
  QueryTile::take(Math{}, p.dim, arena);  // for mask_grad, which packs its own,
  arena.take<float>(BLOCK * TILE);        // and its sums
  return arena.used;
}

}  // namespace
}  // namespace fusedformer
