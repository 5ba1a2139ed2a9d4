"""What the attention kernels share: pieces that work on one tile of scores.

Tiles are (queries, keys), or (keys, queries) where a kernel computes transposed; `i` and `j` are
index tensors that broadcast to the tile, whichever way it lies.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Values of the MASK flag.
NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)
ADDITIVE_MASK = tl.constexpr(2)

NEVER = tl.constexpr(-1e30)  # an additive value at or below this hides its key


@triton.jit
def _aligned(stride):
    # The same number, written so that the compiler sees a multiple of 8: rows of 16 bytes or more.
    return stride // 8 * 8


@triton.jit
def tile_of(
    program,
    tiles,  # of a head
    section,  # heads whose keys and values, or what else their tiles share, fit in the L2 cache
    CAUSAL: tl.constexpr,
    LAST_FIRST: tl.constexpr,  # under a causal mask the last tile of a head is its longest
):
    """Which tile of which head, counted over all batches, a program has.

    Head after head; under a causal mask the longest tiles of a section's heads, then the next ones:
    whatever starts late is short, and fills the gaps.
    """
    if CAUSAL:
        first = program // (section * tiles) * section
        within = program % (section * tiles)
        heads = tl.minimum(section, tl.num_programs(0) // tiles - first)
        tile = within // heads
        batch_head = first + within % heads
        if LAST_FIRST:
            tile = tiles - 1 - tile
    else:
        tile = program % tiles
        batch_head = program // tiles
    return tile, batch_head


@triton.jit
def matrix(
    base,
    batch,  # int64
    head,  # int64
    stride_b,
    stride_h,
    ALIGNED: tl.constexpr,
):
    """Where the (N, D) matrix of one batch element and head starts."""
    if ALIGNED:
        stride_b = _aligned(stride_b)
        stride_h = _aligned(stride_h)
    return base + batch * stride_b + head * stride_h


@triton.jit
def _cells(base, start, stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr):
    row = (start + tl.arange(0, ROWS)).to(tl.int64)
    if ALIGNED:
        stride = _aligned(stride)
    return base + row[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_rows(
    base,  # of one (N, D) matrix, unit stride in D
    start,  # first row of the tile
    stride,  # int64, between rows; a multiple of 8, as those to the matrix are
    limit,  # rows at and past it are zeros, if BOUNDED
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """A (ROWS, BLOCK_D) tile; columns at and past DIM are zeros."""
    at = _cells(base, start, stride, ROWS, BLOCK_D, True)
    row = (start + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    if BOUNDED and DIM < BLOCK_D:
        tile = tl.load(at, mask=(row < limit) & (column < DIM), other=0.0)
    elif BOUNDED:
        tile = tl.load(at, mask=row < limit, other=0.0)
    elif DIM < BLOCK_D:
        tile = tl.load(at, mask=column < DIM, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def reader(
    base,  # of one (N, D) matrix, as in load_rows
    stride,
    limit,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """What read_rows takes."""
    source = base
    if DESCRIPTORS:
        # Of no rows nothing is read, but a descriptor has one or more.
        source = tl.make_tensor_descriptor(
            base, [tl.maximum(limit, 1), DIM], [stride, 1], [ROWS, BLOCK_D]
        )
    return source, stride, limit


@triton.jit
def read_rows(
    reader,
    start,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BOUNDED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """load_rows, or the same by the tensor memory accelerator, which fills with zeros by itself."""
    source, stride, limit = reader
    if DESCRIPTORS:
        tile = source.load([start, 0])
    else:
        tile = load_rows(source, start, stride, limit, DIM, ROWS, BLOCK_D, BOUNDED)
    return tile


@triton.jit
def store_rows(
    base, start, stride, limit, tile, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Stores a (ROWS, BLOCK_D) tile where its rows and columns exist."""
    at = _cells(base, start, stride, ROWS, BLOCK_D, DIM % 8 == 0)
    row = (start + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=(row < limit) & (column < DIM))


@triton.jit
def masked_scores(
    products,  # Q K^T
    scale,  # |scale|, positive; times log2(e) unless EXACT
    start_i,  # the tile's first query and key
    start_j,
    i,
    j,
    n_queries,
    length,  # keys at and past it are hidden
    diagonal,  # query i sees keys j <= i + diagonal
    mask,  # of this batch and head
    stride_mask_i,
    stride_mask_j,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    BOUNDARY: tl.constexpr,  # the tile crosses the diagonal or an end
    EXACT: tl.constexpr,
):
    """Scores s and a factor f such that s * f is the masked score, times log2(e) unless EXACT.

    The factor is left out so that s * f - shift is one fused multiply-add; see exponentials().
    """
    scores = products
    factor = scale
    if MASK != NO_MASK:
        corner = mask + tl.cast(start_i, tl.int64) * stride_mask_i
        corner += tl.cast(start_j, tl.int64) * stride_mask_j
        inside_i = (i - start_i) * tl.cast(stride_mask_i, tl.int32)
        at = corner + (inside_i + (j - start_j) * tl.cast(stride_mask_j, tl.int32))
        given = tl.load(at, mask=(i < n_queries) & (j < length), other=0)
        if MASK == BOOL_MASK:
            scores = tl.where(given != 0, scores, float("-inf"))
        else:
            added = given.to(tl.float32)
            if not EXACT:
                added = added * LOG2E
            scores = tl.where(given <= NEVER, float("-inf"), scores * scale + added)
            factor = 1.0
    if BOUNDARY:
        visible = (j < length) & (i < n_queries)
        if CAUSAL:
            visible = visible & (j <= i + diagonal)
        scores = tl.where(visible, scores, float("-inf"))
    return scores, factor


@triton.jit
def exponentials(exponents, EXACT: tl.constexpr):
    """exp of differences of masked scores, which hold the factor log2(e) unless EXACT.

    float32 keeps the factor out: scores in units of log2 are 1.4 times larger and rounded as much
    worse. In 16 bits that is far below the rounding of the inputs.
    """
    if EXACT:
        weights = tl.exp(exponents)
    else:
        weights = tl.exp2(exponents)
    return weights


@triton.jit
def score_grads(
    products,  # Q K^T
    grad_weights,  # dO V^T
    row_lse,  # of load_lse; broadcasts to the tile
    shift,  # rowsum(dO o O) - dLSE; broadcasts to the tile
    keep,  # int1 tile, if DROPOUT
    inverse_keep_p,  # 1 / (1 - p)
    scale,
    start_i,
    start_j,
    i,
    j,
    n_queries,
    length,
    diagonal,
    mask,
    stride_mask_i,
    stride_mask_j,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    BOUNDARY: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """P with dropped elements zero (not yet scaled), and dS; in float32."""
    scores, factor = masked_scores(
        products, scale, start_i, start_j, i, j, n_queries, length, diagonal, mask,
        stride_mask_i, stride_mask_j, CAUSAL, MASK, BOUNDARY, EXACT,
    )  # fmt: skip
    weights = exponentials(scores * factor - row_lse, EXACT)
    dropped = weights
    if DROPOUT:
        grad_weights = tl.where(keep, grad_weights * inverse_keep_p, 0.0)
        dropped = tl.where(keep, weights, 0.0)
    return dropped, weights * (grad_weights - shift)


@triton.jit
def load_lse(lse, row, n_queries, EXACT: tl.constexpr):
    """LSE of rows in the unit of the scores; 0 for a row with nothing to attend to.

    Such a row's scores are all -inf: exp(-inf - 0) is 0 where exp(-inf + inf) is NaN.
    """
    value = tl.load(lse + row, mask=row < n_queries, other=0.0)
    value = tl.where(value == float("-inf"), 0.0, value)
    if not EXACT:
        value = value * LOG2E
    return value


@triton.jit
def key_length(key_lengths, batch, n_keys, HAS_LENGTHS: tl.constexpr):
    """How many keys this batch element has; lengths out of range are clamped."""
    if HAS_LENGTHS:
        return tl.minimum(tl.maximum(tl.load(key_lengths + batch), 0), n_keys)
    else:
        return n_keys
