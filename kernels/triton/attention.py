"""Attention on Triton: which tiles, how many warps, and the launches.

The kernels are in attention_forward.py, attention_backward.py and attention_mask_grad.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedformer.kernels.triton.attention_backward import (
    attention_key_value_grads_kernel,
    attention_query_grads_kernel,
    attention_shift_kernel,
)
from fusedformer.kernels.triton.attention_forward import attention_fwd_kernel
from fusedformer.kernels.triton.attention_mask_grad import attention_mask_grad_kernel
from fusedformer.kernels.triton.attention_tiles import ADDITIVE_MASK, BOOL_MASK, LOG2E, NO_MASK
from fusedformer.kernels.triton.launch import (
    Chip,
    cdiv,
    chip,
    launch,
    power_of_2,
    unsupported_device,
)
from fusedformer.kernels.triton.rows import dropout_arguments

__all__ = ["attention_bwd", "attention_fwd", "attention_unsupported", "unsupported_device"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NO_MASK, _LOG2E = NO_MASK.value, LOG2E.value  # a constexpr's own operations take their time

Strides = tuple[int, int, int]  # of batch, head and row


@dataclass(frozen=True)
class Config:
    """A launch configuration: the tile of queries, that of keys, and how it is run."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    # Tiles are read through tensor descriptors: on sm_90 and later by the tensor memory
    # accelerator, straight into shared memory.
    descriptors: bool = False
    # In the forward, and for dK and dV: on sm_90 more warps are added, some to read tiles, the
    # others to share the work. It takes descriptors and 4 warps (with 8 the compiler ignores it),
    # and compiles without a mask and with as many key heads as heads; before Triton 3.7, with
    # dropout, in smaller tiles alone.
    specialized: bool = False


# The choices below keep every kernel free of spills in 16 bits on sm_80 and sm_90, at the largest
# tiles that do (`fusedformer aot` shows registers and spills); they are not yet tuned for time.
# Masks and dropout cost registers, so their tiles are smaller. wgmma, on sm_90, takes at least 64
# rows: of queries in the forward and for dQ, of keys for dK and dV, where the tile is transposed.


def _is_large(where: Chip) -> bool:
    """H100, B200 and their like: 228 KB of shared memory, and matrix units fed from it."""
    return 90 <= where.capability < 120


def forward_config(
    block_d: int, dtype: torch.dtype, dropout: bool, masked: bool, where: Chip
) -> Config:
    """Tiles of the forward."""
    large = _is_large(where)
    if dtype == torch.float32:
        if block_d <= 64:
            return Config(64, 32, 8, 1)
        return Config(32, 32, 4, 1) if block_d <= 128 else Config(16, 32, 8, 1)
    if masked:
        if block_d <= 64:
            return Config(128 if large else 64, 32, 8, 1)
        return Config(64, 32, 8, 1 if block_d <= 128 else 2) if large else Config(64, 16, 8, 1)
    if block_d <= 32 and dropout and not large:
        return Config(128, 32, 8, 2)
    if block_d <= 64:
        return Config(128, 64, 8, 2) if dropout else Config(128, 64, 4, 3)
    if block_d <= 128:
        return Config(128, 64, 8, 2) if large else Config(64, 32, 4, 2)
    return Config(128 if large else 64, 32, 8, 2)


def key_value_grads_config(
    block_d: int, dtype: torch.dtype, dropout: bool, masked: bool, where: Chip
) -> Config:
    """Tiles of the dK and dV kernel."""
    large = _is_large(where)
    if dtype == torch.float32:
        return Config(32, 32, 8, 1) if block_d <= 128 else Config(16, 16, 8, 1)
    if masked:
        return Config(32, 64 if block_d <= 64 and large else 32, 8, 1)
    if block_d <= 64:
        if large:
            return Config(64, 128, 8, 2)
        return Config(32, 64, 4, 2) if dropout else Config(64, 64, 8, 2)
    if block_d <= 128:
        if dropout:
            return Config(32, 128 if large else 64, 8, 2)
        return Config(64, 64, 8, 2)
    return Config(32, 32, 8, 2)


def query_grads_config(
    block_d: int, dtype: torch.dtype, dropout: bool, masked: bool, where: Chip
) -> Config:
    """Tiles of the dQ kernel."""
    large = _is_large(where)
    if dtype == torch.float32:
        return Config(32, 32, 8, 1) if block_d <= 128 else Config(16, 16, 8, 1)
    if masked:
        return Config(64 if block_d <= 128 and large else 32, 32, 8, 1)
    if block_d <= 64:
        return Config(128, 64 if large or not dropout else 32, 8, 2)
    if block_d <= 128:
        if large:
            return Config(128, 64, 8, 2)
        return Config(64, 32 if dropout else 64, 8, 2)
    return Config(64 if large else 32, 32, 8, 2)


def mask_grad_config(block_d: int, dtype: torch.dtype, where: Chip) -> Config:
    """Tiles of the kernel of the mask's gradient."""
    if dtype == torch.float32:
        return Config(32 if block_d <= 128 else 16, 32, 8, 1)
    if _is_large(where) and block_d <= 128:
        return Config(64, 32, 8, 1)
    if block_d <= 64:
        return Config(32, 32, 8, 1)
    return Config(16, 32, 4 if block_d <= 128 else 8, 1)


def attention_unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: "Tensor | None",
    key_lengths: "Tensor | None",
    seed: "Tensor | None",
    diagonal: "int | None",
    scale: float,
    dropout_p: float,
    offsets: list[int],
) -> "str | None":
    """Why these kernels cannot take a call, or None."""
    if query.dtype not in DTYPES:
        return f"{query.dtype} runs on the reference backend only"
    if max(query.shape[2], key.shape[2]) >= 2**23:
        return "more than 2^23 queries or keys"
    if mask is not None and max(mask.stride()[2:]) >= 2**23:
        return "the mask's rows or columns lie more than 2^23 elements apart"
    return unsupported_device(query.device)


def _readable(tensor: Tensor) -> tuple[Tensor, Strides]:
    """A (B, H, N, D) tensor that the kernels read 16 bytes at a time, and its strides.

    Itself, or a padded copy. It starts on 16 bytes; unit stride in D, other strides multiples of 8
    elements and short enough for 32-bit offsets inside a tile. What has none of these, such as an
    odd head dimension, is copied once: that is linear where attention is quadratic.
    """
    strides = _strides(tensor)
    of_batch, of_head, of_row = strides
    if (
        (of_batch | of_head | of_row) % 8 == 0
        and of_row < 2**23
        and tensor.stride(3) == 1
        and tensor.data_ptr() % 16 == 0
    ):
        return tensor, strides
    batch, heads, length, dim = tensor.shape
    padded = tensor.new_empty(batch, length, heads, (dim + 7) // 8 * 8)
    copy = padded[..., :dim].transpose(1, 2).copy_(tensor)
    return copy, _strides(copy)


def _mask_arguments(mask: "Tensor | None", placeholder: Tensor) -> tuple[Tensor, list[int], int]:
    """The mask as the kernels read it, its strides (0 where it broadcasts), and the MASK flag."""
    if mask is None:
        return placeholder, [0, 0, 0, 0], _NO_MASK
    strides = [0 if n == 1 else stride for n, stride in zip(mask.shape, mask.stride(), strict=True)]
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8), strides, BOOL_MASK.value
    return mask, strides, ADDITIVE_MASK.value


def _positive_scale(scale: float, dtype: torch.dtype) -> float:
    """|scale|, in units of log2 for 16 bits (see exponentials()).

    A zero scale is made tiny: a hidden score is -inf, and 0 * -inf is NaN.
    """
    return max(abs(scale), 1e-30) * (1.0 if dtype == torch.float32 else _LOG2E)


def _new(like: Tensor) -> tuple[Tensor, Strides]:
    """An empty tensor of a (B, H, N, D) tensor's shape in (B, N, H, D) memory, and its strides."""
    batch, heads, length, dim = like.shape
    row = heads * dim
    new = like.new_empty_strided((batch, heads, length, dim), (length * row, dim, row, 1))
    return new, _strides(new)


def _strides(tensor: Tensor) -> Strides:
    """Strides of batch, head and row; 0 for a dimension of size 1, whose stride means nothing."""
    batch, heads, length, _ = tensor.shape
    of_batch, of_head, of_row, _ = tensor.stride()
    return (
        of_batch if batch > 1 else 0,
        of_head if heads > 1 else 0,
        of_row if length > 1 else 0,
    )


def _section(shared: Tensor, group: int) -> int:
    """How many heads' tiles are taken longest first, at a time: as many as leave what they share,
    two tensors like this one, of which ``group`` heads have each head, in most GPUs' L2 cache."""
    batch, heads, length, dim = shared.shape
    fit = (32 << 20) // max(1, 2 * length * dim * shared.element_size())
    return max(1, min(batch * heads, fit)) * group


def _options(query, key, diagonal, flag, key_lengths, seed, scale, config):
    """What all kernels but the first of the backward take by name."""
    _, heads, _, dim = query.shape
    exact = query.dtype == torch.float32
    return {
        "GROUP": heads // key.shape[1],
        "DIM": dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": block_dim(dim),
        "CAUSAL": diagonal is not None,
        "MASK": flag,
        "HAS_LENGTHS": key_lengths is not None,
        "DROPOUT": seed is not None,
        "NEGATIVE": scale < 0,
        "EXACT": exact,
        # float32 through three TF32 products keeps float32's accuracy on tensor cores.
        "PRECISION": "tf32x3" if exact else "ieee",
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def _ways(config: Config) -> dict[str, bool]:
    """How the forward, and the kernel of dK and dV, read and share out the work."""
    return {"DESCRIPTORS": config.descriptors, "SPECIALIZED": config.specialized}


def block_dim(dim: int) -> int:
    """The head dimension that the tiles have: a power of two, 16 or more."""
    return max(power_of_2(dim), 16)


def attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: "Tensor | None",
    key_lengths: "Tensor | None",
    seed: "Tensor | None",
    diagonal: "int | None",
    scale: float,
    dropout_p: float,
    offsets: list[int],
) -> tuple[Tensor, Tensor]:
    """O and LSE; see reference.attention_fwd."""
    batch, heads, n_queries, dim = query.shape
    query, query_strides = _readable(query)
    key, key_strides = _readable(key)
    value, value_strides = _readable(value)
    out, out_strides = _new(query)
    lse = query.new_empty_strided(
        (batch, heads, n_queries), (heads * n_queries, n_queries, 1), dtype=torch.float32
    )
    mask, mask_strides, flag = _mask_arguments(mask, query)
    kind = (block_dim(dim), query.dtype, seed is not None, flag != _NO_MASK)
    config = forward_config(*kind, chip(query.device))
    launch(
        attention_fwd_kernel,
        (cdiv(n_queries, config.block_m) * batch * heads,),
        query, key, value, out, lse, mask,
        query if key_lengths is None else key_lengths, query if seed is None else seed,
        *query_strides, *key_strides, *value_strides, *out_strides, *mask_strides,
        heads, n_queries, key.shape[2], diagonal or 0, _section(key, heads // key.shape[1]),
        _positive_scale(scale, query.dtype),
        *dropout_arguments(dropout_p), *offsets,
        **_options(query, key, diagonal, flag, key_lengths, seed, scale, config), **_ways(config),
    )  # fmt: skip
    return out, lse


def attention_bwd(
    grad_out: Tensor,
    grad_lse: "Tensor | None",
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: "Tensor | None",
    key_lengths: "Tensor | None",
    seed: "Tensor | None",
    diagonal: "int | None",
    scale: float,
    dropout_p: float,
    offsets: list[int],
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, "Tensor | None"]:
    """dQ, dK, dV and the mask's gradient; see reference.attention_bwd. Deterministic.

    Beside these it needs a float32 for each query of each head.
    """
    batch, heads, n_queries, dim = query.shape
    n_keys, block_d = key.shape[2], block_dim(dim)
    query, query_strides = _readable(query)
    key, key_strides = _readable(key)
    value, value_strides = _readable(value)
    grad_out, grad_out_strides = _readable(grad_out)
    out, out_strides = _readable(out)
    lse = lse.contiguous()
    shift = torch.empty_like(lse)
    block_m = 64 if block_d <= 128 else 32
    launch(
        attention_shift_kernel,
        (cdiv(n_queries, block_m) * batch * heads,),
        out, grad_out, lse if grad_lse is None else grad_lse.contiguous(), shift,
        *out_strides, *grad_out_strides, heads, n_queries,
        DIM=dim, BLOCK_M=block_m, BLOCK_D=block_d, HAS_GRAD_LSE=grad_lse is not None, num_warps=4,
    )  # fmt: skip

    given_mask = mask
    mask, mask_strides, flag = _mask_arguments(mask, query)
    lengths = query if key_lengths is None else key_lengths
    seed_or_none = query if seed is None else seed
    positive_scale = _positive_scale(scale, query.dtype)
    random = (*dropout_arguments(dropout_p), *offsets)
    inputs = (*query_strides, *key_strides, *value_strides, *grad_out_strides)
    sizes = (heads, n_queries, n_keys, diagonal or 0)
    group = heads // key.shape[1]
    where = chip(query.device)
    kind = (block_d, query.dtype, seed is not None, flag != _NO_MASK)

    grad_query, grad_query_strides = _new(query)
    grad_key, grad_key_strides = _new(key)
    grad_value, grad_value_strides = _new(value)
    config = query_grads_config(*kind, where)
    launch(
        attention_query_grads_kernel,
        (cdiv(n_queries, config.block_m) * batch * heads,),
        query, key, value, grad_out, grad_query, lse, shift, mask, lengths, seed_or_none,
        *inputs, *grad_query_strides, *mask_strides, *sizes, _section(key, group),
        positive_scale, scale, *random,
        **_options(query, key, diagonal, flag, key_lengths, seed, scale, config),
        DESCRIPTORS=config.descriptors,
    )  # fmt: skip
    config = key_value_grads_config(*kind, where)
    launch(
        attention_key_value_grads_kernel,
        (cdiv(n_keys, config.block_n) * batch * key.shape[1],),
        query, key, value, grad_out, grad_key, grad_value, lse, shift, mask, lengths, seed_or_none,
        *inputs, *grad_key_strides, *grad_value_strides, *mask_strides, *sizes,
        max(1, _section(query, 1) // group), positive_scale, scale, *random,
        **_options(query, key, diagonal, flag, key_lengths, seed, scale, config), **_ways(config),
    )  # fmt: skip
    if given_mask is None or not mask_grad:
        return grad_query, grad_key, grad_value, None

    grad_mask = given_mask.new_empty(given_mask.shape)
    mask_batches, mask_heads, mask_rows, mask_columns = given_mask.shape
    # A broadcast dimension is one that the mask has once and the scores more often.
    one_row, one_column = mask_rows < n_queries, mask_columns < n_keys
    config = mask_grad_config(block_d, query.dtype, where)
    m_tiles = 1 if one_row else cdiv(n_queries, config.block_m)
    n_tiles = 1 if one_column else cdiv(n_keys, config.block_n)
    launch(
        attention_mask_grad_kernel,
        (m_tiles * n_tiles * mask_batches * mask_heads,),
        query, key, value, grad_out, lse, shift, mask, grad_mask, lengths, seed_or_none,
        *inputs, *mask_strides, *grad_mask.stride(),
        batch, heads, n_queries, n_keys, mask_batches, mask_heads, diagonal or 0,
        positive_scale, *random, ONE_ROW=one_row, ONE_COLUMN=one_column,
        # TF32 in three products would spill: two operands of D columns are split in one program.
        **_options(query, key, diagonal, flag, key_lengths, seed, scale, config)
        | {"PRECISION": "ieee"},
    )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_mask
