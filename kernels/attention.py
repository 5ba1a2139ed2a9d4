"""Softmax-scaled attention: O = dropout(softmax(scale Q K^T + mask)) V.

Vaswani et al., "Attention Is All You Need" (2017), eq. 1. Computed block by block with an online
softmax (Milakov & Gimelshein 2018; Dao, "FlashAttention-2", 2023), so that memory is linear in
the sequence length on every backend except ``reference``.
"""

import math

import torch
from torch import Tensor

from fusedformer.kernels import dispatch, rng
from fusedformer.kernels.attention_plain import attention_plain
from fusedformer.kernels.checks import (
    alike,
    autocast,
    check_dropout_p,
    check_floating,
    check_strided,
    check_tensor,
    checked_scale,
    is_integer,
    shape,
)
from fusedformer.kernels.function import Function, once_differentiable, run

MAX_HEAD_DIM = 256
_OFFSETS_END = 2**62  # sums of two of them and of lengths stay within 64 bits


# --- Registered ops -------------------------------------------------------------------------------

_ARGS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? key_lengths, Tensor? seed, "
    "SymInt? diagonal, float scale, float dropout_p, SymInt[] offsets"
)


def _new_bhnd(like: Tensor) -> Tensor:
    """An empty tensor of a (B, H, N, D) tensor's shape, in (B, N, H, D) memory order."""
    batch, heads, length, dim = like.shape
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def check_length_values(key_lengths: "Tensor | None", limit: int) -> None:
    """Raises ValueError, on a CPU, where a length is not from 0 to limit."""
    # On a GPU, reading values back would synchronise; the kernels clamp them instead.
    if key_lengths is None or not key_lengths.is_cpu or key_lengths.numel() == 0:
        return
    low, high = (int(bound) for bound in key_lengths.aminmax())
    if low < 0 or high > limit:
        raise ValueError(
            f"attention: key_lengths must be between 0 and the number of keys, {limit}; "
            f"got values from {low} to {high}"
        )


def _fwd(query, key, value, mask, key_lengths, seed, diagonal, scale, dropout_p, offsets, backend):
    if key_lengths is not None:
        check_length_values(key_lengths, key.shape[2])
    if query.numel() == 0 or key.numel() == 0:  # nothing to attend to
        out = _new_bhnd(query).zero_()
        return out, query.new_full(query.shape[:3], -math.inf, dtype=_lse_dtype(query))
    if dropout_p == 1:  # all is dropped; only the LSE is left to compute
        args = (query, key, value, mask, key_lengths, None, diagonal, scale, 0.0, offsets)
        out, lse = dispatch.pick("attention", backend, args).attention_fwd(*args)
        return out.zero_(), lse
    args = (query, key, value, mask, key_lengths, seed, diagonal, scale, dropout_p, offsets)
    return dispatch.pick("attention", backend, args).attention_fwd(*args)


def _fwd_fake(query, key, value, *args):
    return _new_bhnd(query), query.new_empty(query.shape[:3], dtype=_lse_dtype(query))


def _bwd(
    grad_out, grad_lse, out, lse,
    query, key, value, mask, key_lengths, seed, diagonal, scale, dropout_p, offsets,
    mask_grad, backend,
):  # fmt: skip
    if query.numel() == 0 or key.numel() == 0:
        grads = [_new_bhnd(tensor).zero_() for tensor in (query, key, value)]
        return (*grads, mask.new_zeros(mask.shape) if mask_grad else query.new_empty(0))
    if dropout_p == 1:
        grad_out, seed, dropout_p = torch.zeros_like(grad_out), None, 0.0
    if grad_lse is not None:
        # A row with nothing to attend to has no gradient, whatever merging its LSE of -inf gave.
        grad_lse = grad_lse.masked_fill(lse == -math.inf, 0)
    args = (query, key, value, mask, key_lengths, seed, diagonal, scale, dropout_p, offsets)
    module = dispatch.pick("attention", backend, args)
    grads = module.attention_bwd(grad_out, grad_lse, out, lse, *args, mask_grad)
    return (*grads[:3], query.new_empty(0)) if grads[3] is None else grads


def _bwd_fake(grad_out, grad_lse, out, lse, query, key, value, mask, *args):
    mask_grad = args[-2]
    grads = [_new_bhnd(tensor) for tensor in (query, key, value)]
    return (*grads, mask.new_empty(mask.shape) if mask_grad else query.new_empty(0))


_call_fwd = dispatch.define(
    "attention",
    "attention",
    f"attention_fwd({_ARGS}, str backend) -> (Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
_call_bwd = dispatch.define(
    "attention",
    "attention",
    f"attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_ARGS}, "
    "bool mask_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


class _Attention(Function):
    differentiable = 4

    # Parameters by name: Dynamo cannot trace forward(*args) where nothing requires a gradient.
    @staticmethod
    def forward(
        query, key, value, mask, key_lengths, seed, diagonal, scale, dropout_p, offsets, backend
    ):  # fmt: skip
        return _call_fwd(
            query, key, value, mask, key_lengths, seed, diagonal, scale, dropout_p, offsets, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, mask, key_lengths, seed, *ctx.options = inputs
        ctx.save_for_backward(query, key, value, mask, key_lengths, seed, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        *args, out, lse = ctx.saved_tensors
        if grad_out is None:
            if grad_lse is None:
                return (None,) * 11
            grad_out = out.new_zeros(()).expand(out.shape)
        *options, backend = ctx.options
        mask_grad = ctx.needs_input_grad[3]
        *grads, grad_mask = _call_bwd(
            grad_out, grad_lse, out, lse, *args, *options, mask_grad, backend
        )
        return (*grads, grad_mask if mask_grad else None, *(None,) * 7)


# --- Public functions -----------------------------------------------------------------------------


def check_shapes(name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises unless query, key and value are as attention() asks."""
    if not alike(query, key, value):
        for label, tensor in (("query", query), ("key", key), ("value", value)):
            check_floating(name, label, tensor)
            check_tensor(name, label, tensor, like=query, like_label="query")
    sizes, key_sizes, value_sizes = query.shape, key.shape, value.shape
    for label, got in (("query", sizes), ("key", key_sizes), ("value", value_sizes)):
        if len(got) != 4:
            raise ValueError(f"{name}: {label} must be (B, H, N, D); got {tuple(got)}")
    batch, heads, _, dim = sizes
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: head dimension must be 1 to {MAX_HEAD_DIM}; query has {dim}")
    for label, got in (("key", key_sizes), ("value", value_sizes)):
        if got[0] != batch or got[3] != dim:
            raise ValueError(
                f"{name}: {label} must have the batch size {batch} and the head dimension {dim} "
                f"of query; got {tuple(got)}"
            )
    if value_sizes != key_sizes:
        raise ValueError(
            f"{name}: value must have the heads and the length of key, {tuple(key_sizes)}; "
            f"got {tuple(value_sizes)}"
        )
    key_heads = key_sizes[1]
    if heads and (key_heads == 0 or heads % key_heads):
        raise ValueError(
            f"{name}: the heads of query ({heads}) must be a multiple of those of key and value; "
            f"got {key_heads}"
        )


def _checked_mask(name: str, label: str, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask, an argument called label, as a 4-d view whose sizes are 1 where it broadcasts."""
    check_tensor(name, label, mask, like=query, like_label="query", same_dtype=False)
    check_strided(name, label, mask)
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"{name}: {label} must be bool or floating point; got {mask.dtype}")
    if mask.dtype == torch.float64 and query.dtype != torch.float64:
        raise TypeError(f"{name}: a float64 {label} needs a float64 query; got {query.dtype}")
    wanted = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if mask.dim() > 4 or any(
        size not in (1, full) for size, full in zip(mask.shape[::-1], wanted[::-1], strict=False)
    ):
        raise ValueError(
            f"{name}: {label} must broadcast to {wanted} (B, H, Nq, Nk); got {shape(mask)}"
        )
    return mask[(None,) * (4 - mask.dim())]


def checked_lengths(name: str, key_lengths: Tensor, query: Tensor) -> Tensor:
    """key_lengths as the op takes them; their values are check_length_values()'s."""
    check_tensor(name, "key_lengths", key_lengths, like=query, like_label="query", same_dtype=False)
    check_strided(name, "key_lengths", key_lengths)
    if key_lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: key_lengths must be int32 or int64; got {key_lengths.dtype}")
    if tuple(key_lengths.shape) != (query.shape[0],):
        raise ValueError(
            f"{name}: key_lengths must be ({query.shape[0]},), one for each batch element; "
            f"got {shape(key_lengths)}"
        )
    if key_lengths.dtype == torch.int64:  # so that no bad length wraps into a good one
        key_lengths = key_lengths.clamp(-(2**30), 2**30)
    return key_lengths.to(torch.int32).contiguous()


def _checked_offsets(name: str, offsets: "tuple[int, int, int, int]") -> list[int]:
    if not isinstance(offsets, (tuple, list)) or len(offsets) != 4:
        raise ValueError(
            f"{name}: offsets must be four ints (batch, head, query, key); got {offsets!r}"
        )
    if not all(is_integer(offset) or isinstance(offset, torch.SymInt) for offset in offsets):
        raise TypeError(f"{name}: offsets must be ints; got {tuple(offsets)}")
    if any(offset < 0 for offset in offsets) or offsets[2] % 16 or offsets[3] % 16:
        raise ValueError(
            f"{name}: offsets must not be negative, and those of query and key must be multiples "
            f"of 16; got {tuple(offsets)}"
        )
    if not torch.compiler.is_compiling() and max(offsets) >= _OFFSETS_END:
        raise ValueError(f"{name}: offsets must be below 2^62; got {tuple(offsets)}")
    return [offset if isinstance(offset, torch.SymInt) else int(offset) for offset in offsets]


def checked_attention(
    name, query, key, value, mask, key_lengths, causal, scale, dropout_p, seed, offsets, backend,
    mask_name="mask",
):  # fmt: skip
    """Checks what every public function shares, then runs; returns (O, LSE).

    causal: False, "first" (query 0 sees key 0: torch's rule) or "last" (the last query sees the
    last key; with offsets, positions decide).
    """
    query, key, value = autocast(name, query, key, value)
    check_shapes(name, query, key, value)
    check_dropout_p(name, dropout_p)
    positions = [0, 0, 0, 0] if offsets is None else _checked_offsets(name, offsets)
    diagonal = 0 if causal == "first" else None
    if causal == "last":
        lengths = key.shape[2] - query.shape[2]
        diagonal = lengths if offsets is None else positions[2] - positions[3]
    if mask is not None:
        mask = _checked_mask(name, mask_name, mask, query, key)
    if key_lengths is not None:
        key_lengths = checked_lengths(name, key_lengths, query)
    scale = query.shape[3] ** -0.5 if scale is None else checked_scale(name, scale)
    if seed is not None:
        rng.check_seed(name, seed, query.device)
    if dropout_p > 0:
        rng.check_positions(name, (*query.shape[:3], key.shape[2]), positions)
        seed = rng.as_seed(name, seed, query.device)
    else:
        seed = None
    return run(
        _Attention,
        query, key, value, mask, key_lengths, seed, diagonal, scale, float(dropout_p), positions,
        dispatch.checked(name, backend),
    )  # fmt: skip


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: "Tensor | None" = None,
    key_lengths: "Tensor | None" = None,
    causal: bool = False,
    scale: "float | None" = None,
    dropout_p: float = 0.0,
    seed: "int | Tensor | None" = None,
    offsets: "tuple[int, int, int, int] | None" = None,
    return_lse: bool = False,
    backend: "str | None" = None,
) -> "Tensor | tuple[Tensor, Tensor]":
    """Multi-head softmax attention, dropout included, in memory linear in the lengths.

    O = dropout(softmax(scale Q K^T + mask)) V (Vaswani et al. 2017, eq. 1), accumulated in float32.

    Args:
        query: (B, H, Nq, D), float32, float16 or bfloat16 (float64 on the reference backend only);
            any strides. D from 1 to 256.
        key, value: (B, Hkv, Nk, D), dtype of query; H is a multiple of Hkv (grouped-query
            attention: query head h reads key head h // (H / Hkv)).
        mask: broadcastable to (B, H, Nq, Nk); bool (True = attend) or additive. An additive value
            <= -1e30 counts as not attending. An additive mask that requires a gradient gets it.
        key_lengths: (B,) int32 or int64; keys at and past a length are hidden, and may hold NaN.
        causal: query i sees keys j <= i + Nk - Nq (the last query sees the last key); with
            offsets, those whose global position is not after its own.
        scale: factor of the scores; 1 / sqrt(D) by default.
        dropout_p: probability, in [0, 1], that a probability is dropped after the softmax; those
            kept are scaled by 1 / (1 - p). Always applied: pass 0 at inference.
        seed: of the dropout mask; drawn from torch's generator when None.
        offsets: where (batch, head, query, key) start in the whole problem, so that a part of it
            drops exactly what the whole would; those of query and key multiples of 16.
        return_lse: also return log sum_j exp(S_ij), differentiable.
        backend: "triton", "cpu", "cuda" or "reference"; None chooses, never "cuda" yet. One that
            is named runs or raises.

    Returns:
        O (B, H, Nq, D) of query's dtype, a view of (B, Nq, H, D) memory; with return_lse also LSE
        (B, H, Nq) float32. A row with nothing to attend to gives O = 0 and LSE = -inf.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is not as above.
        RuntimeError: the backend named cannot run this call; the message says why.
    """
    if (
        mask is None and key_lengths is None and seed is None and offsets is None
        and backend is None and not return_lse
    ):  # fmt: skip
        out = attention_plain(query, key, value, causal, scale, dropout_p)
        if out is not None:
            return out
    out, lse = checked_attention(
        "attention", query, key, value, mask, key_lengths, "last" if causal else False, scale,
        dropout_p, seed, offsets, backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out
