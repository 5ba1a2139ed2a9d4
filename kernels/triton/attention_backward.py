"""The backward kernels of attention: every gradient is summed by one program in a fixed order.

FlashAttention-2 (Dao 2023), algorithm 2, in two passes so that nothing is added atomically: dK and
dV by programs that own a tile of keys, dQ by programs that own a tile of queries. Both recompute P
from the saved LSE.
"""

import triton
import triton.language as tl

from fusedformer.kernels.triton.attention_tiles import (
    NO_MASK,
    key_length,
    load_lse,
    load_rows,
    matrix,
    read_rows,
    reader,
    score_grads,
    store_rows,
    tile_of,
)
from fusedformer.kernels.triton.random import attention_keep


@triton.jit(do_not_specialize=["n_queries", "heads"])
def attention_shift_kernel(
    out, grad_out,  # (B, H, Nq, D)
    grad_lse,  # (B, H, Nq) float32, contiguous, if HAS_GRAD_LSE
    shift,  # (B, H, Nq) float32, contiguous: rowsum(dO o O) - dLSE
    stride_ob: tl.int64, stride_oh: tl.int64, stride_on: tl.int64,
    stride_gb: tl.int64, stride_gh: tl.int64, stride_gn: tl.int64,
    heads, n_queries,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n_queries, BLOCK_M)
    start_i = tl.program_id(0) % tiles * BLOCK_M
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    out = matrix(out, batch, head, stride_ob, stride_oh, True)
    grad_out = matrix(grad_out, batch, head, stride_gb, stride_gh, True)
    o = load_rows(out, start_i, stride_on, n_queries, DIM, BLOCK_M, BLOCK_D, True)
    g = load_rows(grad_out, start_i, stride_gn, n_queries, DIM, BLOCK_M, BLOCK_D, True)
    row_shift = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    i = start_i + tl.arange(0, BLOCK_M)
    at = batch_head * n_queries + i
    if HAS_GRAD_LSE:
        row_shift -= tl.load(grad_lse + at, mask=i < n_queries, other=0.0)
    tl.store(shift + at, row_shift, mask=i < n_queries)


@triton.jit
def _key_value_grads(
    grad_key, grad_value,  # accumulators (BLOCK_N, BLOCK_D)
    k, v,
    query, grad_out,  # readers
    lse, shift, mask, stride_mask_i, stride_mask_j,
    start_j, first, n_first, second, n_tiles,
    n_queries, length, diagonal, scale,
    seed, threshold, inverse_keep_p, batch, head, query_offset, key_offset,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, BOUNDARY: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """Adds what n_tiles tiles of queries give: n_first from `first` on, the rest from `second`."""
    j = start_j + tl.arange(0, BLOCK_N)
    for t in tl.range(0, n_tiles, warp_specialize=SPECIALIZED):
        start_i = first + t * BLOCK_M
        if BOUNDARY:
            start_i = tl.where(t < n_first, start_i, second + (t - n_first) * BLOCK_M)
        start_i = tl.multiple_of(start_i, BLOCK_M)
        i = start_i + tl.arange(0, BLOCK_M)
        q = read_rows(query, start_i, DIM, BLOCK_M, BLOCK_D, BOUNDARY, DESCRIPTORS)
        g = read_rows(grad_out, start_i, DIM, BLOCK_M, BLOCK_D, BOUNDARY, DESCRIPTORS)
        row_lse = load_lse(lse, i, n_queries, EXACT)
        row_shift = tl.load(shift + i, mask=i < n_queries, other=0.0)
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        grad_weights = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        keep = 0
        if DROPOUT:
            keep = attention_keep(
                seed, threshold, batch, head, query_offset + start_i, key_offset + start_j,
                BLOCK_M, BLOCK_N, True,
            )  # fmt: skip
        dropped, grad_scores = score_grads(
            products, grad_weights, row_lse[None, :], row_shift[None, :], keep, inverse_keep_p,
            scale, start_i, start_j, i[None, :], j[:, None], n_queries, length, diagonal,
            mask, stride_mask_i, stride_mask_j, CAUSAL, MASK, BOUNDARY, DROPOUT, EXACT,
        )  # fmt: skip
        grad_value = tl.dot(dropped.to(g.dtype), g, grad_value, input_precision=PRECISION)
        grad_key = tl.dot(grad_scores.to(q.dtype), q, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit(
    do_not_specialize=[
        "n_queries", "n_keys", "section", "diagonal",
        "threshold", "batch_offset", "head_offset", "query_offset", "key_offset", "heads",
    ]
)  # fmt: skip
def attention_key_value_grads_kernel(
    query,  # (B, H, Nq, D)
    key, value,  # (B, Hkv, Nk, D)
    grad_out,  # (B, H, Nq, D)
    grad_key, grad_value,  # (B, Hkv, Nk, D)
    lse, shift,  # (B, H, Nq) float32, contiguous
    mask,  # as in the forward
    key_lengths,  # (B,) int32, if HAS_LENGTHS
    seed,  # 0-d int64, if DROPOUT
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qn: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_gb: tl.int64, stride_gh: tl.int64, stride_gn: tl.int64,
    stride_dkb: tl.int64, stride_dkh: tl.int64, stride_dkn: tl.int64,
    stride_dvb: tl.int64, stride_dvh: tl.int64, stride_dvn: tl.int64,
    stride_mb: tl.int64, stride_mh: tl.int64, stride_mi: tl.int64, stride_mj,
    heads, n_queries, n_keys, diagonal,
    section,  # see tile_of()
    scale,  # as in the forward
    grad_scale,  # the scale with its sign
    threshold: tl.uint32, inverse_keep_p,
    batch_offset, head_offset, query_offset, key_offset,
    GROUP: tl.constexpr,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, SPECIALIZED: tl.constexpr,  # see Config
):  # fmt: skip
    tiles = tl.cdiv(n_keys, BLOCK_N)
    # Under a causal mask the first keys are seen by most queries.
    tile, batch_head = tile_of(tl.program_id(0), tiles, section, CAUSAL, False)
    start_j = tile * BLOCK_N
    batch = (batch_head // (heads // GROUP)).to(tl.int64)
    key_head = (batch_head % (heads // GROUP)).to(tl.int64)
    length = key_length(key_lengths, batch, n_keys, HAS_LENGTHS)

    # Tiles of queries: [0, first) see none of these keys, [full, whole) see them all; on the
    # boundary are [first, full), which cross the diagonal, and [second, total), the ragged end.
    total = tl.cdiv(n_queries, BLOCK_M)
    whole = n_queries // BLOCK_M
    first = 0
    full = 0
    if CAUSAL:
        first = tl.maximum(start_j - diagonal, 0) // BLOCK_M
        full = tl.cdiv(tl.maximum(start_j + BLOCK_N - 1 - diagonal, 0), BLOCK_M)
    if start_j >= length:
        first = total
    if SPECIALIZED or start_j + BLOCK_N > length:
        full = total
    first = tl.minimum(first, total)
    full = tl.minimum(tl.maximum(full, first), total)
    second = tl.maximum(whole, full)
    n_first = full - first

    k_base = matrix(key, batch, key_head, stride_kb, stride_kh, True)
    v_base = matrix(value, batch, key_head, stride_vb, stride_vh, True)
    key = reader(k_base, stride_kn, length, DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)
    value = reader(v_base, stride_vn, length, DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)
    k = read_rows(key, start_j, DIM, BLOCK_N, BLOCK_D, True, DESCRIPTORS)
    if NEGATIVE:
        k = (-k.to(tl.float32)).to(k.dtype)
    v = read_rows(value, start_j, DIM, BLOCK_N, BLOCK_D, True, DESCRIPTORS)
    random_seed = 0
    if DROPOUT:
        random_seed = tl.load(seed)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(0, GROUP):
        head = key_head * GROUP + member
        q_base = matrix(query, batch, head, stride_qb, stride_qh, True)
        g_base = matrix(grad_out, batch, head, stride_gb, stride_gh, True)
        queries = reader(q_base, stride_qn, n_queries, DIM, BLOCK_M, BLOCK_D, DESCRIPTORS)
        grads = reader(g_base, stride_gn, n_queries, DIM, BLOCK_M, BLOCK_D, DESCRIPTORS)
        row_base = (batch * heads + head) * n_queries
        m_base = mask
        if MASK != NO_MASK:
            m_base += batch * stride_mb + head * stride_mh
        for BOUNDARY in tl.static_range(SPECIALIZED, 2):
            dk, dv = _key_value_grads(
                dk, dv, k, v, queries, grads, lse + row_base, shift + row_base,
                m_base, stride_mi, stride_mj,
                start_j, (first if BOUNDARY else full) * BLOCK_M, n_first, second * BLOCK_M,
                n_first + total - second if BOUNDARY else whole - full,
                n_queries, length, diagonal, scale,
                random_seed, threshold, inverse_keep_p, batch + batch_offset, head + head_offset,
                query_offset, key_offset,
                DIM, BLOCK_M, BLOCK_N, BLOCK_D, CAUSAL, MASK, DROPOUT, BOUNDARY, EXACT, PRECISION,
                DESCRIPTORS, SPECIALIZED,
            )  # fmt: skip
    if DROPOUT:
        dv = dv * inverse_keep_p
    dk = dk * grad_scale
    grad_key = matrix(grad_key, batch, key_head, stride_dkb, stride_dkh, DIM % 8 == 0)
    grad_value = matrix(grad_value, batch, key_head, stride_dvb, stride_dvh, DIM % 8 == 0)
    store_rows(grad_key, start_j, stride_dkn, n_keys, dk, DIM, BLOCK_N, BLOCK_D)
    store_rows(grad_value, start_j, stride_dvn, n_keys, dv, DIM, BLOCK_N, BLOCK_D)


@triton.jit
def _query_grads(
    grad_query,  # accumulator (BLOCK_M, BLOCK_D)
    q, g, row_lse, row_shift,
    key, value,  # readers
    mask, stride_mask_i, stride_mask_j,
    start_i, start, end, n_queries, length, diagonal, scale,
    seed, threshold, inverse_keep_p, batch, head, query_offset, key_offset,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, BOUNDARY: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    i = start_i + tl.arange(0, BLOCK_M)
    for start_j in range(start, end, BLOCK_N):
        start_j = tl.multiple_of(start_j, BLOCK_N)
        j = start_j + tl.arange(0, BLOCK_N)
        k = read_rows(key, start_j, DIM, BLOCK_N, BLOCK_D, BOUNDARY, DESCRIPTORS)
        v = read_rows(value, start_j, DIM, BLOCK_N, BLOCK_D, BOUNDARY, DESCRIPTORS)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        grad_weights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        keep = 0
        if DROPOUT:
            keep = attention_keep(
                seed, threshold, batch, head, query_offset + start_i, key_offset + start_j,
                BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
        _, grad_scores = score_grads(
            products, grad_weights, row_lse[:, None], row_shift[:, None], keep, inverse_keep_p,
            scale, start_i, start_j, i[:, None], j[None, :], n_queries, length, diagonal,
            mask, stride_mask_i, stride_mask_j, CAUSAL, MASK, BOUNDARY, DROPOUT, EXACT,
        )  # fmt: skip
        grad_query = tl.dot(grad_scores.to(k.dtype), k, grad_query, input_precision=PRECISION)
    return grad_query


@triton.jit(
    do_not_specialize=[
        "n_queries", "n_keys", "section", "diagonal",
        "threshold", "batch_offset", "head_offset", "query_offset", "key_offset", "heads",
    ]
)  # fmt: skip
def attention_query_grads_kernel(
    query,  # (B, H, Nq, D)
    key, value,  # (B, Hkv, Nk, D)
    grad_out, grad_query,  # (B, H, Nq, D)
    lse, shift,  # (B, H, Nq) float32, contiguous
    mask,  # as in the forward
    key_lengths,  # (B,) int32, if HAS_LENGTHS
    seed,  # 0-d int64, if DROPOUT
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qn: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_gb: tl.int64, stride_gh: tl.int64, stride_gn: tl.int64,
    stride_dqb: tl.int64, stride_dqh: tl.int64, stride_dqn: tl.int64,
    stride_mb: tl.int64, stride_mh: tl.int64, stride_mi: tl.int64, stride_mj,
    heads, n_queries, n_keys, diagonal,
    section,  # see tile_of()
    scale,  # as in the forward
    grad_scale,  # the scale with its sign
    threshold: tl.uint32, inverse_keep_p,
    batch_offset, head_offset, query_offset, key_offset,
    GROUP: tl.constexpr,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,  # see Config
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

    full, end = length, length
    if CAUSAL:
        full = tl.minimum(full, tl.maximum(start_i + diagonal + 1, 0))
        last = tl.minimum(start_i + BLOCK_M, n_queries) + diagonal
        end = tl.minimum(end, tl.maximum(last, 0))
    full = full // BLOCK_N * BLOCK_N

    i = start_i + tl.arange(0, BLOCK_M)
    query = matrix(query, batch, head, stride_qb, stride_qh, True)
    grad_out = matrix(grad_out, batch, head, stride_gb, stride_gh, True)
    query = reader(query, stride_qn, n_queries, DIM, BLOCK_M, BLOCK_D, DESCRIPTORS)
    grad_out = reader(grad_out, stride_gn, n_queries, DIM, BLOCK_M, BLOCK_D, DESCRIPTORS)
    q = read_rows(query, start_i, DIM, BLOCK_M, BLOCK_D, True, DESCRIPTORS)
    if NEGATIVE:
        q = (-q.to(tl.float32)).to(q.dtype)
    g = read_rows(grad_out, start_i, DIM, BLOCK_M, BLOCK_D, True, DESCRIPTORS)
    rows = batch_head.to(tl.int64) * n_queries
    row_lse = load_lse(lse + rows, i, n_queries, EXACT)
    row_shift = tl.load(shift + rows + i, mask=i < n_queries, other=0.0)
    random_seed = 0
    if DROPOUT:
        random_seed = tl.load(seed)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for BOUNDARY in tl.static_range(2):
        dq = _query_grads(
            dq, q, g, row_lse, row_shift,
            key, value, mask, stride_mi, stride_mj,
            start_i, full if BOUNDARY else 0, end if BOUNDARY else full,
            n_queries, length, diagonal, scale,
            random_seed, threshold, inverse_keep_p, batch + batch_offset, head + head_offset,
            query_offset, key_offset,
            DIM, BLOCK_M, BLOCK_N, BLOCK_D, CAUSAL, MASK, DROPOUT, BOUNDARY, EXACT, PRECISION,
            DESCRIPTORS,
        )  # fmt: skip
    grad_query = matrix(grad_query, batch, head, stride_dqb, stride_dqh, DIM % 8 == 0)
    store_rows(grad_query, start_i, stride_dqn, n_queries, dq * grad_scale, DIM, BLOCK_M, BLOCK_D)
