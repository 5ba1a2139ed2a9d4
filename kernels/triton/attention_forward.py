"""The forward kernel of attention: one program per tile of queries, an online softmax over keys.

FlashAttention-2 (Dao 2023), algorithm 1. Tiles that need no mask come first, then those on the
boundary: the diagonal and the end of the keys. Tiles above the diagonal and past the key lengths
are not visited.
"""

import triton
import triton.language as tl

from fusedformer.kernels.triton.attention_tiles import (
    LN2,
    NO_MASK,
    exponentials,
    key_length,
    masked_scores,
    matrix,
    read_rows,
    reader,
    store_rows,
    tile_of,
)
from fusedformer.kernels.triton.random import attention_keep


@triton.jit
def _attend(
    accumulator, row_max, row_sum,  # the online softmax's state
    query, key, value,  # a tile, and two readers
    mask, stride_mask_i, stride_mask_j,
    start_i, start, end, n_queries, length, diagonal, scale,
    seed, threshold, batch, head, query_offset, key_offset,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, BOUNDARY: tl.constexpr,
    EXACT: tl.constexpr,  # scores in natural units; see exponentials()
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    i = start_i + tl.arange(0, BLOCK_M)
    for start_j in tl.range(start, end, BLOCK_N, warp_specialize=SPECIALIZED):
        start_j = tl.multiple_of(start_j, BLOCK_N)
        j = start_j + tl.arange(0, BLOCK_N)
        k = read_rows(key, start_j, DIM, BLOCK_N, BLOCK_D, BOUNDARY, DESCRIPTORS)
        products = tl.dot(query, tl.trans(k), input_precision=PRECISION)
        scores, factor = masked_scores(
            products, scale, start_i, start_j, i[:, None], j[None, :], n_queries, length,
            diagonal, mask, stride_mask_i, stride_mask_j, CAUSAL, MASK, BOUNDARY, EXACT,
        )  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
        shift = new_max
        if BOUNDARY or MASK != NO_MASK:
            # A row that has seen nothing yet: exp(-inf - 0) is 0 where exp(-inf + inf) is NaN.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = exponentials(scores * factor - shift[:, None], EXACT)
        rescale = exponentials(row_max - shift, EXACT)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        if DROPOUT:
            keep = attention_keep(
                seed, threshold, batch, head, query_offset + start_i, key_offset + start_j,
                BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
            weights = tl.where(keep, weights, 0.0)
        v = read_rows(value, start_j, DIM, BLOCK_N, BLOCK_D, BOUNDARY, DESCRIPTORS)
        accumulator = accumulator * rescale[:, None]
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator, input_precision=PRECISION)
        row_max = new_max
    return accumulator, row_max, row_sum


@triton.jit(
    do_not_specialize=[
        "n_queries", "n_keys", "section", "diagonal",
        "threshold", "batch_offset", "head_offset", "query_offset", "key_offset", "heads",
    ]
)  # fmt: skip
def attention_fwd_kernel(
    query,  # (B, H, Nq, D)
    key,  # (B, Hkv, Nk, D)
    value,  # (B, Hkv, Nk, D)
    out,  # (B, H, Nq, D)
    lse,  # (B, H, Nq) float32, contiguous
    mask,  # uint8 or floating (B, H, Nq, Nk) with stride 0 where it broadcasts; see MASK
    key_lengths,  # (B,) int32, if HAS_LENGTHS
    seed,  # 0-d int64, if DROPOUT
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qn: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_on: tl.int64,
    stride_mb: tl.int64, stride_mh: tl.int64, stride_mi: tl.int64, stride_mj,
    heads, n_queries, n_keys, diagonal,
    section,  # see tile_of()
    scale,  # |scale|, positive; times log2(e) unless EXACT
    threshold: tl.uint32,  # of dropout
    inverse_keep_p,  # 1 / (1 - p)
    batch_offset, head_offset, query_offset, key_offset,  # of dropout's positions
    GROUP: tl.constexpr,  # H / Hkv
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr,
    # The scale is negative: Q is negated, so that |scale| applies after the maximum.
    NEGATIVE: tl.constexpr,
    EXACT: tl.constexpr,  # scores in natural units; see exponentials()
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, SPECIALIZED: tl.constexpr,  # see Config
):  # fmt: skip
    tiles = tl.cdiv(n_queries, BLOCK_M)
    tile, batch_head = tile_of(tl.program_id(0), tiles, section, CAUSAL, True)
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    start_i = tile * BLOCK_M
    key = matrix(key, batch, head // GROUP, stride_kb, stride_kh, True)
    value = matrix(value, batch, head // GROUP, stride_vb, stride_vh, True)
    if MASK != NO_MASK:
        mask += batch * stride_mb + head * stride_mh
    length = key_length(key_lengths, batch, n_keys, HAS_LENGTHS)
    key = reader(key, stride_kn, length, DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)
    value = reader(value, stride_vn, length, DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)

    # Keys [0, full) need no mask, [full, end) may, the rest are seen by no query of this tile.
    full, end = length, length
    if CAUSAL:
        full = tl.minimum(full, tl.maximum(start_i + diagonal + 1, 0))
        last = tl.minimum(start_i + BLOCK_M, n_queries) + diagonal
        end = tl.minimum(end, tl.maximum(last, 0))
    full = full // BLOCK_N * BLOCK_N
    if SPECIALIZED:
        full = 0  # warps are assigned for one loop alone

    query = matrix(query, batch, head, stride_qb, stride_qh, True)
    query = reader(query, stride_qn, n_queries, DIM, BLOCK_M, BLOCK_D, DESCRIPTORS)
    q = read_rows(query, start_i, DIM, BLOCK_M, BLOCK_D, True, DESCRIPTORS)
    if NEGATIVE:
        q = (-q.to(tl.float32)).to(q.dtype)  # exact
    random_seed = 0
    if DROPOUT:
        random_seed = tl.load(seed)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for BOUNDARY in tl.static_range(SPECIALIZED, 2):
        accumulator, row_max, row_sum = _attend(
            accumulator, row_max, row_sum,
            q, key, value, mask, stride_mi, stride_mj,
            start_i, full if BOUNDARY else 0, end if BOUNDARY else full,
            n_queries, length, diagonal, scale,
            random_seed, threshold, batch + batch_offset, head + head_offset,
            query_offset, key_offset,
            DIM, BLOCK_M, BLOCK_N, BLOCK_D, CAUSAL, MASK, DROPOUT, BOUNDARY, EXACT, PRECISION,
            DESCRIPTORS, SPECIALIZED,
        )  # fmt: skip

    # A row with nothing to attend to has the sum 0 and the maximum -inf: O = 0, LSE = -inf.
    empty = row_sum == 0
    row_sum = tl.where(empty, 1.0, row_sum)
    if DROPOUT:
        accumulator = accumulator * (inverse_keep_p / row_sum)[:, None]
    else:
        accumulator = accumulator / row_sum[:, None]
    out = matrix(out, batch, head, stride_ob, stride_oh, DIM % 8 == 0)
    store_rows(out, start_i, stride_on, n_queries, accumulator, DIM, BLOCK_M, BLOCK_D)
    i = start_i + tl.arange(0, BLOCK_M)
    if EXACT:
        row_lse = row_max + tl.log(row_sum)
    else:
        row_lse = (row_max + tl.log2(row_sum)) * LN2
    row_lse = tl.where(empty, float("-inf"), row_lse)
    tl.store(lse + batch_head.to(tl.int64) * n_queries + i, row_lse, mask=i < n_queries)
