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
def load_rows(
    base,  # of one (N, D) matrix, unit stride in D
    start,  # first row of the tile
    stride,  # int64, between rows
    limit,  # rows at and past it are zeros, if BOUNDED
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """A (ROWS, BLOCK_D) tile; columns at and past DIM are zeros."""
    row = start + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    at = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    if BOUNDED and DIM < BLOCK_D:
        return tl.load(at, mask=(row[:, None] < limit) & (column[None, :] < DIM), other=0.0)
    elif BOUNDED:
        return tl.load(at, mask=row[:, None] < limit, other=0.0)
    elif DIM < BLOCK_D:
        return tl.load(at, mask=column[None, :] < DIM, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_rows(
    base, start, stride, limit, tile, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Stores a (ROWS, BLOCK_D) tile where its rows and columns exist."""
    row = start + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    at = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    inside = (row[:, None] < limit) & (column[None, :] < DIM)
    tl.store(at, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def masked_scores(
    products,  # Q K^T
    scale_log2,  # |scale| * log2(e), positive
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
):
    """Scores s and a factor f such that s * f is the masked score times log2(e).

    The factor is left out so that s * f - m is one fused multiply-add.
    """
    scores = products
    factor = scale_log2
    if MASK != NO_MASK:
        at = mask + i.to(tl.int64) * stride_mask_i + j.to(tl.int64) * stride_mask_j
        given = tl.load(at, mask=(i < n_queries) & (j < length), other=0)
        if MASK == BOOL_MASK:
            scores = tl.where(given != 0, scores, float("-inf"))
        else:
            given = given.to(tl.float32)
            scores = tl.where(
                given <= NEVER, float("-inf"), scores * scale_log2 + given * LOG2E
            )
            factor = 1.0
    if BOUNDARY:
        visible = (j < length) & (i < n_queries)
        if CAUSAL:
            visible = visible & (j <= i + diagonal)
        scores = tl.where(visible, scores, float("-inf"))
    return scores, factor


@triton.jit
def score_grads(
    products,  # Q K^T
    grad_weights,  # dO V^T
    lse_log2,  # LSE * log2(e), 0 for a row with nothing to attend to; broadcasts to the tile
    shift,  # rowsum(dO o O) - dLSE; broadcasts to the tile
    keep,  # int1 tile, if DROPOUT
    inverse_keep_p,  # 1 / (1 - p)
    scale_log2,
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
):
    """P (with dropped elements zero, not yet scaled) and dS, in float32."""
    scores, factor = masked_scores(
        products, scale_log2, i, j, n_queries, length, diagonal, mask, stride_mask_i,
        stride_mask_j, CAUSAL, MASK, BOUNDARY,
    )  # fmt: skip
    weights = tl.exp2(scores * factor - lse_log2)
    if DROPOUT:
        grad_scores = weights * (tl.where(keep, grad_weights * inverse_keep_p, 0.0) - shift)
        weights = tl.where(keep, weights, 0.0)
    else:
        grad_scores = weights * (grad_weights - shift)
    return weights, grad_scores


@triton.jit
def load_lse_log2(lse, row, n_queries):
    """LSE * log2(e) of rows; 0 for a row with nothing to attend to, whose scores are all -inf."""
    value = tl.load(lse + row, mask=row < n_queries, other=0.0)
    return tl.where(value == float("-inf"), 0.0, value * LOG2E)


@triton.jit
def key_length(key_lengths, batch, n_keys, HAS_LENGTHS: tl.constexpr):
    """How many keys this batch element has; lengths out of range are clamped."""
    if HAS_LENGTHS:
        return tl.minimum(tl.maximum(tl.load(key_lengths + batch), 0), n_keys)
    else:
        return n_keys
