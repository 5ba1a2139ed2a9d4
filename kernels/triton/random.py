"""The dropout masks of kernels/rng.py, made in registers: same bits, any tile shape."""

import triton
import triton.language as tl

from fusedformer.kernels import rng

ROUNDS = tl.constexpr(rng.ROUNDS)
ATTENTION = tl.constexpr(rng.ATTENTION << 16)


@triton.jit
def _rotated(word, bits):
    # A shift by 32 is undefined, hence the second mask: (32 - 0) & 31 = 0 leaves word | word.
    return (word << bits) | (word >> ((32 - bits) & 31))


@triton.jit
def _words(seed, c0, c1, c2, c3):
    """The four words of each call, as two more dimensions: [..., x, y] is word 2 x + y."""
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3, n_rounds=ROUNDS)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def attention_keep(
    seed,  # int64
    threshold,  # uint32
    batch,
    head,
    query_start,  # global position of the tile's first row, a multiple of 16
    key_start,  # global position of the tile's first column, a multiple of 16
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # give (KEYS, QUERIES) instead
):
    """Which scores of a tile are kept: int1 (QUERIES, KEYS). Sizes are multiples of 16."""
    call_i = tl.cast(query_start // 4, tl.uint32) + tl.arange(0, QUERIES // 4).to(tl.uint32)
    call_j = tl.cast(key_start // 4, tl.uint32) + tl.arange(0, KEYS // 4).to(tl.uint32)
    if TRANSPOSED:
        c0, c1 = call_i[None, :], call_j[:, None]
    else:
        c0, c1 = call_i[:, None], call_j[None, :]
    zero = tl.zeros_like(c0 + c1)
    c2 = zero + tl.cast(head + ATTENTION, tl.uint32)
    words = _words(seed, zero + c0, zero + c1, c2, zero + tl.cast(batch, tl.uint32))  # [., ., x, y]
    low = words >= threshold
    key8 = _rotated(words, 8) >= threshold
    query8 = _rotated(words, 16) >= threshold
    both8 = _rotated(words, 24) >= threshold
    # [., ., x, y, query + 8, key + 8]
    kept = tl.join(tl.join(low, query8), tl.join(key8, both8))
    if TRANSPOSED:
        # (tile_j, b, tile_i, a, x, y, query8, key8) -> (tile_j, key8, b, y, tile_i, query8, a, x)
        kept = tl.reshape(kept, KEYS // 16, 4, QUERIES // 16, 4, 2, 2, 2, 2)
        kept = tl.permute(kept, 0, 7, 1, 5, 2, 6, 3, 4)
        kept = tl.reshape(kept, KEYS, QUERIES)
    else:
        # (tile_i, a, tile_j, b, x, y, query8, key8) -> (tile_i, query8, a, x, tile_j, key8, b, y)
        kept = tl.reshape(kept, QUERIES // 16, 4, KEYS // 16, 4, 2, 2, 2, 2)
        kept = tl.permute(kept, 0, 6, 1, 4, 2, 7, 3, 5)
        kept = tl.reshape(kept, QUERIES, KEYS)
    return kept


@triton.jit
def rows_keep(
    seed,  # int64
    threshold,  # uint32
    rows,  # int64 (ROWS,)
    column_start,  # of the tile, a multiple of 16
    TAG: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a multiple of 16
):
    """Which elements of rows are kept: int1 (ROWS, COLUMNS)."""
    call = tl.cast(column_start, tl.int64) // 16 + tl.arange(0, COLUMNS // 16)[None, :]
    row = rows.to(tl.int64)[:, None]
    zero = tl.zeros([ROWS, COLUMNS // 16], tl.uint32)
    words = _words(
        seed,
        zero + (call & 0xFFFFFFFF).to(tl.uint32),
        zero + (row & 0xFFFFFFFF).to(tl.uint32),
        zero + ((row >> 32) + (TAG << 16)).to(tl.uint32),
        zero + (call >> 32).to(tl.uint32),
    )
    words = tl.reshape(words, ROWS, COLUMNS // 16, 1, 4)
    bits = 8 * tl.arange(0, 4).to(tl.uint32)[None, None, :, None]
    return tl.reshape(_rotated(words, bits) >= threshold, ROWS, COLUMNS)
