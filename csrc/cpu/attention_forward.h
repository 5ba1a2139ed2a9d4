// The forward of attention: a tile of queries against one block of keys after another, with an
// online softmax (Milakov & Gimelshein 2018; Dao, "FlashAttention-2", 2023).
//
// Scores are computed transposed, S^T = K Q^T, queries in the lanes: maximum, sum and rescaling are
// then operations on whole vectors, K and V are read element by element where they lie, and any
// number of keys is just a number of rows.
#pragma once

#include "attention_mask.h"
#include "attention_random.h"

namespace fusedformer {
namespace {

// One tile's state between blocks of keys.
struct QueryState {
  float* query;    // (words of D, TILE), its sign that of the scale
  float* out;      // (D, TILE): the sum of weights times values
  float* maximum;  // (TILE,) of the scores so far, in the unit of the exponents
  float* sum;      // (TILE,) of the weights so far
  int64_t first;   // query
  int n;           // queries
  int64_t end;     // of the keys that it sees
};

struct ForwardScratch {
  float *keys, *values;
  float* scores;  // of a panel of queries: (BLOCK, C vectors); then their weights
  float *bias, *rows;
  uint8_t* kept;
  QueryState states[MAX_TILES];

  ForwardScratch(const Attention& p, Arena& arena) {
    const size_t width = rounded_up(p.dim, LANES);
    keys = arena.take<float>(BLOCK * width);
    values = arena.take<float>(BLOCK * width);
    scores = arena.take<float>(BLOCK * COLUMNS * LANES);
    bias = arena.take<float>((BLOCK + LANES) * TILE);
    rows = arena.take<float>(TILE * (width > BLOCK ? width : BLOCK));
    kept = arena.take<uint8_t>(BLOCK * TILE / 8);
    for (QueryState& state : states) {
      state.query = arena.take<float>(width * TILE);
      state.out = arena.take<float>(width * TILE);
      state.maximum = arena.take<float>(TILE);
      state.sum = arena.take<float>(TILE);
    }
  }
};

// A block of keys and values, packed or where they lie.
struct KeyBlock {
  StepsInRows keys;
  RowsInSteps values;
  int64_t first;  // key
  int n;          // keys
};

// Rows that follow each other without a gap need no packing in float32.
template <class Math>
bool in_place(const Attention& p, const Tensor4& t) {
  return Math::PER_WORD == 1 && p.dtype == DType::float32 && t.row == 4 * p.dim;
}

template <class Math>
KeyBlock pack_keys(const Attention& p, int64_t b, int64_t h, int64_t first, int n,
                   ForwardScratch& s) {
  const int words = Pack<Math>::words(p.dim);
  const char *keys = p.key.at(b, h, first), *values = p.value.at(b, h, first);
  KeyBlock block = {{keys, p.key.row}, {values, p.value.row}, first, n};
  if (!in_place<Math>(p, p.key)) {
    Pack<Math>::rows(p.dtype, keys, p.key.row, n, p.dim, s.keys, words);
    block.keys = {reinterpret_cast<char*>(s.keys), 4 * words};
  }
  if (!in_place<Math>(p, p.value)) {
    const int width = rounded_up(p.dim, LANES);
    Pack<Math>::steps(p.dtype, values, p.value.row, n, p.dim, s.values, width);
    block.values = {reinterpret_cast<char*>(s.values), 4 * width};
  }
  return block;
}

template <class Math>
void start_tile(const Attention& p, int64_t b, int64_t h, int64_t tile, ForwardScratch& s,
                QueryState& state) {
  state.first = tile * TILE;
  state.n = static_cast<int>(p.n_queries - state.first < TILE ? p.n_queries - state.first : TILE);
  state.end = p.key_end(b, tile);
  pack_columns<Math>(p.dtype, p.query.at(b, h, state.first), p.query.row, state.n, p.dim, s.rows,
                     state.query);
  if (p.scale < 0) flip_signs(state.query, Pack<Math>::words(p.dim) * TILE, Math::SIGNS);
  const int filled = rounded_up(state.n, LANES);
  fill(state.maximum, filled, LEAST_MAXIMUM);
  fill(state.sum, filled, 0);
  clear_columns(state.out, p.dim, filled);
}

// S^T, and its maximum over the keys for each query; plus the bias, if there is one, in which case
// the scale is applied. A function of its own, so that its loop has all registers.
template <class Math, int C>
FUSEDFORMER_APART void scores(const Attention& p, const float* query, StepsInRows keys, int rows,
                              const float* bias, float* to, float* maximum) {
  const Vec scale = set(__builtin_fabsf(p.scale));
  for (int c = 0; c < C; ++c) store(maximum + c * LANES, set(-__builtin_inff()));
  each_strip<rows_of<C>()>(0, rows, [&](auto height, int row) FUSEDFORMER_LAMBDA {
    constexpr int R = decltype(height)::value;
    product_tile<Math, R, C>(
        Pack<Math>::words(p.dim), keys.from(row), query, TILE,
        [&](Vec(&sums)[R][C]) FUSEDFORMER_LAMBDA {
          if (bias) {
            FUSEDFORMER_UNROLL for (int r = 0; r < R; ++r)
              FUSEDFORMER_UNROLL for (int c = 0; c < C; ++c)
                sums[r][c] = fma(sums[r][c], scale, load(bias + (row + r) * TILE + c * LANES));
          }
          FUSEDFORMER_UNROLL for (int c = 0; c < C; ++c) {
            Vec most = load(maximum + c * LANES);
            FUSEDFORMER_UNROLL for (int r = 0; r < R; ++r) {
              store(to + ((row + r) * C + c) * LANES, sums[r][c]);
              most = larger(sums[r][c], most);
            }
            store(maximum + c * LANES, most);
          }
        });
  });
}

// P^T as words for the sum over keys.
FUSEDFORMER_INLINE void store_weights(Float32, float* to, Vec first, Vec) { store(to, first); }
#ifdef __AVX512BF16__
FUSEDFORMER_INLINE void store_weights(Bfloat16, float* to, Vec low, Vec high) {
  store(to, pair(low, high));
}
#endif

// exp(factor S - maximum) for some rows; adds them up, and stores them with what dropout drops
// being 0, in place of the scores. The scale 1 / (1 - p) is applied to the sums at the end.
template <class Math, bool DROPOUT, int C>
FUSEDFORMER_INLINE void exponentials(int rows, float* scores, float factor, int v,
                                     const Vec (&maximum)[C], Vec (&sum)[C], const uint8_t* kept) {
  constexpr int PER = Math::PER_WORD;
  const Vec factors = set(factor);
  Vec part[C];
  const auto one = [&](int row, int c) FUSEDFORMER_LAMBDA {
    Vec e = Math::exp(fms(load(scores + (row * C + c) * LANES), factors, maximum[c]));
    part[c] = add(part[c], e);
    if constexpr (DROPOUT) e = where(lanes(kept + 8 * row, v + c), e);
    return e;
  };
  // Sums of sums: one after another, thousands of keys would cost the LSE some of its last bits.
  constexpr int PART = 16;
  for (int row = 0; row < rows;) {
    const int end = row + PART < rows ? row + PART : rows;
    FUSEDFORMER_UNROLL for (int c = 0; c < C; ++c) part[c] = zero();
    for (; row + PER <= end; row += PER)
      FUSEDFORMER_UNROLL for (int c = 0; c < C; ++c) {
        const Vec first = one(row, c), second = PER == 2 ? one(row + 1, c) : first;
        store_weights(Math{}, scores + (row / PER * C + c) * LANES, first, second);
      }
    for (; row < end; ++row)  // the last of an odd number
      FUSEDFORMER_UNROLL for (int c = 0; c < C; ++c)
        store_weights(Math{}, scores + (row / PER * C + c) * LANES, one(row, c), zero());
    FUSEDFORMER_UNROLL for (int c = 0; c < C; ++c) sum[c] = add(sum[c], part[c]);
  }
}

// A block of keys for C vectors of the queries of a tile.
template <class Math, int C>
void attend(const Attention& p, QueryState& state, const KeyBlock& block, int rows,
            const float* bias, const uint8_t* kept, ForwardScratch& s, int v) {
  const float factor = bias ? Math::UNIT : __builtin_fabsf(p.scale) * Math::UNIT;
  alignas(64) float block_maximum[TILE], rescale[TILE];
  const int first = v * LANES;
  scores<Math, C>(p, state.query + first, block.keys, rows, bias ? bias + first : nullptr, s.scores,
                  block_maximum);
  Vec maximum[C], sum[C];
  FUSEDFORMER_UNROLL for (int c = 0; c < C; ++c) {
    const int at = (v + c) * LANES;
    const Vec before = load(state.maximum + at);
    maximum[c] = larger(mul(load(block_maximum + c * LANES), set(factor)), before);
    const Vec change = Math::exp(fms(before, set(1.0f), maximum[c]));
    store(rescale + at, change);
    store(state.maximum + at, maximum[c]);
    store(state.sum + at, mul(load(state.sum + at), change));
    sum[c] = zero();
  }
  if (kept)
    exponentials<Math, true, C>(rows, s.scores, factor, v, maximum, sum, kept);
  else
    exponentials<Math, false, C>(rows, s.scores, factor, v, maximum, sum, kept);
  FUSEDFORMER_UNROLL for (int c = 0; c < C; ++c) {
    float* at = state.sum + (v + c) * LANES;
    store(at, add(load(at), sum[c]));
  }
  product<Math, true>(p.dim, (rows + Math::PER_WORD - 1) / Math::PER_WORD, C, block.values,
                      s.scores, C * LANES, state.out + first, TILE, rescale + first);
}

template <class Math>
void attend_block(const Attention& p, int64_t b, int64_t h, QueryState& state,
                  const KeyBlock& block, ForwardScratch& s) {
  const int rows = static_cast<int>(
      state.end - block.first < block.n ? state.end - block.first : block.n);
  if (rows <= 0) return;
  const float* bias =
      bias_tile(p, b, h, state.first, state.n, block.first, rows, s.rows, s.bias);
  const uint8_t* kept = nullptr;
  if (p.dropout) {
    kept_block(p, b, h, state.first, state.n, block.first, rows, s.kept);
    kept = s.kept;
  }
  each_panel((state.n + LANES - 1) / LANES, [&](auto width, int v) {
    constexpr int C = decltype(width)::value;
    // Under a causal mask, the panel's last query may see fewer keys than the tile's.
    const int64_t seen = state.first + (v + C) * LANES + p.diagonal - block.first;
    const int some = static_cast<int>(seen < rows ? seen : rows);
    if (some > 0) attend<Math, C>(p, state, block, some, bias, kept, s, v);
  });
}

template <class Math>
void finish_tile(const Attention& p, int64_t b, int64_t h, QueryState& state, ForwardScratch& s) {
  if (p.lse) {
    float* lse = p.lse + (b * p.heads + h) * p.n_queries + state.first;
    // Rounded but once: the backward takes the exponential of what is stored. A row with nothing to
    // attend to has O = 0 and LSE = -inf.
    for (int i = 0; i < state.n; ++i)
      lse[i] = static_cast<float>(state.maximum[i] / static_cast<double>(Math::UNIT) +
                                  __builtin_log(state.sum[i]));
  }
  for (int i = 0; i < state.n; ++i)
    state.sum[i] = state.sum[i] == 0 ? 0 : p.inverse_keep / state.sum[i];
  const auto factor = [&](int row) FUSEDFORMER_LAMBDA { return state.sum[row]; };
  store_columns(state.out, factor, state.n, p.dim, s.rows, p.dtype, p.out.at(b, h, state.first),
                p.out.row);
}

template <class Math>
size_t forward_scratch(const Attention& p) {
  Arena arena = {nullptr};
  ForwardScratch counted(p, arena);
  return arena.used;
}

// n tiles of queries share what is packed of the keys and values.
template <class Math>
void forward(const Attention& p, int64_t b, int64_t h, int64_t first_tile, int n, char* scratch) {
  Arena arena = {scratch};
  ForwardScratch s(p, arena);
  int64_t end = 0;
  for (int t = 0; t < n; ++t) {
    start_tile<Math>(p, b, h, first_tile + t, s, s.states[t]);
    end = s.states[t].end > end ? s.states[t].end : end;
  }
  for (int64_t first = 0; first < end; first += BLOCK) {
    const int keys = static_cast<int>(end - first < BLOCK ? end - first : BLOCK);
    const KeyBlock block = pack_keys<Math>(p, b, h / p.group(), first, keys, s);
    for (int t = 0; t < n; ++t) attend_block<Math>(p, b, h, s.states[t], block, s);
  }
  for (int t = 0; t < n; ++t) finish_tile<Math>(p, b, h, s.states[t], s);
}

}  // namespace
}  // namespace fusedformer
