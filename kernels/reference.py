"""The oracle: every op, forward and backward, in plain PyTorch. The book of formulas.

Computes in float32, or in float64 when an input is float64. Memory is that of the formulas, so
attention's is quadratic. Runs on every device that PyTorch has.
"""

import torch
from torch import Tensor

from fusedformer.kernels import rng

NEVER = -1e30  # an additive mask value at or below this hides its key


def unsupported_device(device: torch.device) -> "str | None":
    """The reference runs wherever PyTorch does."""
    return None


# --- Attention (Vaswani et al. 2017, eq. 1; LSE and the backward as in FlashAttention-2, 2023) ----


def attention_unsupported(*args: object) -> "str | None":
    """The reference takes every call."""
    return None


def attention_hidden(
    query: Tensor,
    key: Tensor,
    mask: "Tensor | None",
    key_lengths: "Tensor | None",
    diagonal: "int | None",
) -> Tensor:
    """Which scores do not attend: bool, broadcastable to (B, H, Nq, Nk), True = hidden."""
    i = torch.arange(query.shape[2], device=query.device)[:, None]
    j = torch.arange(key.shape[2], device=query.device)
    hidden = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=query.device)
    if diagonal is not None:
        hidden = hidden | (j > i + diagonal)
    if key_lengths is not None:
        hidden = hidden | (j >= key_lengths[:, None, None, None])
    if mask is not None:
        hidden = hidden | (~mask if mask.dtype == torch.bool else mask <= NEVER)
    return hidden


def _attention_operands(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: "Tensor | None"
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V to compute with: heads of K and V repeated, nothing (such as NaN) past the lengths."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if key_lengths is not None:
        past = torch.arange(key.shape[2], device=key.device)[:, None] >= key_lengths.view(-1, 1, 1, 1)
        key, value = key.masked_fill(past, 0), value.masked_fill(past, 0)
    group = query.shape[1] // max(key.shape[1], 1)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _attention_scores(
    query: Tensor, key: Tensor, mask: "Tensor | None", hidden: Tensor, scale: float
) -> Tensor:
    """S = scale Q K^T + mask, and -inf where hidden."""
    scores = scale * (query @ key.mT)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    return scores.masked_fill(hidden, -torch.inf)


def _bnhd(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A (B, H, N, D) tensor in (B, N, H, D) memory order, as every backend returns it."""
    batch, heads, length, dim = tensor.shape
    out = tensor.new_empty(batch, length, heads, dim, dtype=dtype).transpose(1, 2)
    return out.copy_(tensor)


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
    """O = dropout(P) V with P = exp(S - LSE), LSE = log sum_j exp(S): the softmax of S.

    A row with nothing to attend to has P = 0, O = 0 and LSE = -inf.
    """
    q, k, v = _attention_operands(query, key, value, key_lengths)
    hidden = attention_hidden(query, key, mask, key_lengths, diagonal)
    scores = _attention_scores(q, k, mask, hidden, scale)
    lse = scores.logsumexp(-1)  # (B, H, Nq)
    weights = torch.exp(scores - lse[..., None]).masked_fill(hidden, 0)  # P
    if seed is not None:
        keep = rng.attention_keep(seed, dropout_p, tuple(scores.shape), offsets)
        weights = weights * keep / (1 - dropout_p)
    return _bnhd(weights @ v, query.dtype), lse


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
    """With M = keep / (1 - p), so that O = (P o M) V:

    dV = (P o M)^T dO; dP = M o (dO V^T); dS = P o (dP - rowsum(dO o O) + dLSE);
    dQ = scale dS K; dK = scale dS^T Q; dmask = dS, summed over the dimensions it broadcasts.
    """
    q, k, v = _attention_operands(query, key, value, key_lengths)
    hidden = attention_hidden(query, key, mask, key_lengths, diagonal)
    scores = _attention_scores(q, k, mask, hidden, scale)
    weights = torch.exp(scores - lse[..., None]).masked_fill(hidden, 0)
    grad_out, out = grad_out.to(q.dtype), out.to(q.dtype)
    kept = 1.0
    if seed is not None:
        keep = rng.attention_keep(seed, dropout_p, tuple(scores.shape), offsets)
        kept = keep / (1 - dropout_p)
    grad_v = (weights * kept).mT @ grad_out
    grad_weights = kept * (grad_out @ v.mT)
    shift = (grad_out * out).sum(-1)
    if grad_lse is not None:
        shift = shift - grad_lse
    grad_scores = weights * (grad_weights - shift[..., None])
    grad_q, grad_k = scale * (grad_scores @ k), scale * (grad_scores.mT @ q)
    grouped = (*key.shape[:2], -1, *key.shape[2:])  # (B, Hkv, H / Hkv, Nk, D)
    return (
        _bnhd(grad_q, query.dtype),
        _bnhd(grad_k.view(grouped).sum(2), key.dtype),
        _bnhd(grad_v.view(grouped).sum(2), value.dtype),
        grad_scores.sum_to_size(mask.shape).to(mask.dtype) if mask_grad else None,
    )
