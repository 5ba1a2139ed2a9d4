"""Attention on Hopper: which calls the kernels of csrc/cuda take, and the calls.

A call that they do not take has a reason, one sentence, and nothing is copied to make it fit but a
gradient, whose strides the caller does not choose.
"""

import torch
from torch import Tensor

from fusedformer.kernels import rng
from fusedformer.kernels.cuda.library import about, library, unsupported_device, unsupported_gpu

__all__ = ["about", "attention_bwd", "attention_fwd", "attention_unsupported", "unsupported_device"]

DTYPES = (torch.float16, torch.bfloat16)
MAX_DIM = 256


def _tma_refuses(tensor: Tensor) -> "str | None":
    """Why TMA cannot load a 16-bit (B, H, N, D) tensor, or None; D is a multiple of 8."""
    if tensor.data_ptr() % 16:
        return "does not start on 16 bytes"
    strides = tensor.stride()
    # That of a dimension of size 1 means nothing. 0 (expand) is nowhere promised to work.
    used = [stride for n, stride in zip(tensor.shape[:3], strides[:3], strict=True) if n > 1]
    if strides[3] != 1 or any(stride % 8 or not 0 < stride < 2**39 for stride in used):
        return f"has strides {tuple(strides)}, not positive multiples of 8 before a 1"
    return None


def _readable(tensor: Tensor) -> Tensor:
    """A tensor that TMA can load: itself, or a copy in (B, N, H, D) memory order."""
    if _tma_refuses(tensor) is None:
        return tensor
    batch, heads, length, dim = tensor.shape
    return tensor.new_empty(batch, length, heads, dim).transpose(1, 2).copy_(tensor)


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
    batch, heads, n_queries, dim = query.shape
    if reason := unsupported_gpu(query.device):
        return reason
    if query.dtype not in DTYPES:
        return f"the CUDA kernels take float16 and bfloat16; the tensors are {query.dtype}"
    if dim % 8 or dim > MAX_DIM:
        return f"the CUDA kernels take head dimensions of 8, 16, ... {MAX_DIM}; this one is {dim}"
    if mask is not None:
        return "the CUDA kernels take causal and key_lengths, and no mask"
    if scale <= 0:
        return f"the CUDA kernels take a positive scale; this one is {scale}"
    if max(n_queries, key.shape[2]) >= 2**30:
        return "2^30 queries or keys, or more"
    # Tiles are counted in 32 bits; the smallest are 64 queries or keys.
    if batch * heads * ((max(n_queries, key.shape[2]) + 63) // 64) >= 2**31:
        return "batch x heads x length is 2^37 or more"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if reason := _tma_refuses(tensor):
            return f"the CUDA kernels load by TMA; {name} {reason}"
    return library()[1]


def _options(
    key: Tensor,
    key_lengths: "Tensor | None",
    seed: "Tensor | None",
    diagonal: "int | None",
    scale: float,
    dropout_p: float,
    offsets: list[int],
) -> tuple:
    """What both entry points take after query, key and value."""
    if diagonal is None:
        diagonal = key.shape[2]  # which hides nothing
    dropout = rng.threshold(dropout_p), 1 / (1 - dropout_p)
    return (key_lengths, seed, diagonal, scale, *dropout, *offsets)


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
    options = _options(key, key_lengths, seed, diagonal, scale, dropout_p, offsets)
    return torch.ops.fusedformer_cuda.attention_fwd.default(query, key, value, *options)


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
    """dQ, dK, dV and None; see reference.attention_bwd.

    Deterministic where torch.use_deterministic_algorithms() asks for it; else the sums that make dQ
    are added in the order in which they come.
    """
    options = _options(key, key_lengths, seed, diagonal, scale, dropout_p, offsets)
    grads = torch.ops.fusedformer_cuda.attention_bwd.default(
        _readable(grad_out), None if grad_lse is None else grad_lse.contiguous(),
        _readable(out), lse.contiguous(), query, key, value, *options,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return (*grads, None)
