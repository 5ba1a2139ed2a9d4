"""The kernel of an additive mask's gradient: dS, summed over what the mask broadcasts over.

One program per tile of the mask adds up, in order, every tile of scores that it stands for.
"""

import triton
import triton.language as tl

from fusedformer.kernels.triton.attention_tiles import (
    key_length,
    load_lse,
    load_rows,
    matrix,
    score_grads,
)
from fusedformer.kernels.triton.random import attention_keep


@triton.jit(
    do_not_specialize=[
        "n_queries", "n_keys", "diagonal",
        "stride_gmb", "stride_gmh", "stride_gmi", "stride_gmj",
        "threshold", "batch_offset", "head_offset", "query_offset", "key_offset", "heads",
        "batches", "mask_batches", "mask_heads",
    ]
)  # fmt: skip
def attention_mask_grad_kernel(
    query,  # (B, H, Nq, D)
    key, value,  # (B, Hkv, Nk, D)
    grad_out,  # (B, H, Nq, D)
    lse, shift,  # (B, H, Nq) float32, contiguous
    mask,  # as in the forward, additive
    grad_mask,  # (mask's B, H, Nq, Nk, each 1 where it broadcasts)
    key_lengths,  # (B,) int32, if HAS_LENGTHS
    seed,  # 0-d int64, if DROPOUT
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qn: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_gb: tl.int64, stride_gh: tl.int64, stride_gn: tl.int64,
    stride_mb: tl.int64, stride_mh: tl.int64, stride_mi: tl.int64, stride_mj,
    stride_gmb: tl.int64, stride_gmh: tl.int64, stride_gmi: tl.int64, stride_gmj: tl.int64,
    batches, heads, n_queries, n_keys, mask_batches, mask_heads, diagonal,
    scale,  # as in the forward
    threshold: tl.uint32, inverse_keep_p,
    batch_offset, head_offset, query_offset, key_offset,
    GROUP: tl.constexpr,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ONE_ROW: tl.constexpr, ONE_COLUMN: tl.constexpr,  # the mask broadcasts over queries, over keys
):  # fmt: skip
    m_tiles = tl.cdiv(n_queries, BLOCK_M)
    n_tiles = tl.cdiv(n_keys, BLOCK_N)
    own_m = 1 if ONE_ROW else m_tiles
    own_n = 1 if ONE_COLUMN else n_tiles
    program = tl.program_id(0)
    tile_j = program % own_n
    tile_i = program // own_n % own_m
    mask_head = program // own_n // own_m % mask_heads
    mask_batch = program // own_n // own_m // mask_heads
    random_seed = 0
    if DROPOUT:
        random_seed = tl.load(seed)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    batch_count = batches // mask_batches
    head_count = heads // mask_heads
    i_count = m_tiles // own_m
    j_count = n_tiles // own_n
    for step in range(0, batch_count * head_count * i_count * j_count):
        start_j = (tile_j + step % j_count) * BLOCK_N
        start_i = (tile_i + step // j_count % i_count) * BLOCK_M
        head = (mask_head + step // j_count // i_count % head_count).to(tl.int64)
        batch = (mask_batch + step // j_count // i_count // head_count).to(tl.int64)
        length = key_length(key_lengths, batch, n_keys, HAS_LENGTHS)
        end = length
        if CAUSAL:
            end = tl.minimum(end, start_i + BLOCK_M + diagonal)
        if start_j < end:
            i = start_i + tl.arange(0, BLOCK_M)
            j = start_j + tl.arange(0, BLOCK_N)
            q_base = matrix(query, batch, head, stride_qb, stride_qh, True)
            g_base = matrix(grad_out, batch, head, stride_gb, stride_gh, True)
            k_base = matrix(key, batch, head // GROUP, stride_kb, stride_kh, True)
            v_base = matrix(value, batch, head // GROUP, stride_vb, stride_vh, True)
            m_base = mask + batch * stride_mb + head * stride_mh
            rows = (batch * heads + head) * n_queries
            q = load_rows(q_base, start_i, stride_qn, n_queries, DIM, BLOCK_M, BLOCK_D, True)
            if NEGATIVE:
                q = (-q.to(tl.float32)).to(q.dtype)
            g = load_rows(g_base, start_i, stride_gn, n_queries, DIM, BLOCK_M, BLOCK_D, True)
            k = load_rows(k_base, start_j, stride_kn, length, DIM, BLOCK_N, BLOCK_D, True)
            v = load_rows(v_base, start_j, stride_vn, length, DIM, BLOCK_N, BLOCK_D, True)
            row_lse = load_lse(lse + rows, i, n_queries, EXACT)
            row_shift = tl.load(shift + rows + i, mask=i < n_queries, other=0.0)
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            grad_weights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
            keep = 0
            if DROPOUT:
                keep = attention_keep(
                    random_seed, threshold, batch + batch_offset, head + head_offset,
                    query_offset + start_i, key_offset + start_j, BLOCK_M, BLOCK_N, False,
                )  # fmt: skip
            _, grad_scores = score_grads(
                products, grad_weights, row_lse[:, None], row_shift[:, None], keep,
                inverse_keep_p, scale, start_i, start_j, i[:, None], j[None, :], n_queries,
                length, diagonal, m_base, stride_mi, stride_mj, CAUSAL, MASK, True, DROPOUT,
                EXACT,
            )  # fmt: skip
            total += grad_scores
    grad_mask += mask_batch.to(tl.int64) * stride_gmb + mask_head.to(tl.int64) * stride_gmh
    if ONE_ROW:
        total = tl.sum(total, 0)[None, :]
    if ONE_COLUMN:
        total = tl.sum(total, 1)[:, None]
    i = tile_i * BLOCK_M + tl.arange(0, 1 if ONE_ROW else BLOCK_M)
    j = tile_j * BLOCK_N + tl.arange(0, 1 if ONE_COLUMN else BLOCK_N)
    at = i.to(tl.int64)[:, None] * stride_gmi + j.to(tl.int64)[None, :] * stride_gmj
    inside = (i[:, None] < n_queries) & (j[None, :] < n_keys)
    tl.store(grad_mask + at, total.to(grad_mask.dtype.element_ty), mask=inside)
