"""The oracle: every op, forward and backward, in plain PyTorch. The book of formulas.

Computes in float32, or in float64 when an input is float64. Memory is that of the formulas, so
attention's is quadratic. Runs on every device that PyTorch has.
"""

import math

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


dropout_unsupported = dropout_add_layer_norm_unsupported = attention_unsupported
bias_activation_unsupported = cross_entropy_unsupported = attention_unsupported


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
    """Q, K, V to compute with: heads of K and V repeated, zeros (not NaN) past the lengths."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if key_lengths is not None:
        row = torch.arange(key.shape[2], device=key.device)[:, None]
        past = row >= key_lengths.view(-1, 1, 1, 1)
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


def _attention_kept(
    scores: Tensor, seed: "Tensor | None", p: float, offsets: list[int]
) -> "Tensor | float":
    """M: 0 where a probability is dropped, 1 / (1 - p) where it is kept."""
    if seed is None:
        return 1.0
    return rng.attention_keep(seed, p, scores.shape, offsets).to(scores.dtype) / (1 - p)


def attention_weights(
    query, key, mask, key_lengths, seed, diagonal, scale, dropout_p, offsets
) -> Tensor:  # fmt: skip
    """P o M, (B, H, Nq, Nk): what attention_fwd multiplies with V. Differentiable."""
    q, k, _ = _attention_operands(query, key, key, key_lengths)
    hidden = attention_hidden(query, key, mask, key_lengths, diagonal)
    weights = _attention_scores(q, k, mask, hidden, scale).softmax(-1).masked_fill(hidden, 0)
    return weights * _attention_kept(weights, seed, dropout_p, offsets)


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
    """O = dropout(P) V with P = softmax(S); LSE = log sum_j exp(S), so that P = exp(S - LSE).

    A row with nothing to attend to has P = 0, O = 0 and LSE = -inf.
    """
    q, k, v = _attention_operands(query, key, value, key_lengths)
    hidden = attention_hidden(query, key, mask, key_lengths, diagonal)
    scores = _attention_scores(q, k, mask, hidden, scale)
    weights = scores.softmax(-1).masked_fill(hidden, 0)  # P
    weights = weights * _attention_kept(scores, seed, dropout_p, offsets)
    return _bnhd(weights @ v, query.dtype), scores.logsumexp(-1)


def attention_bwd(
    grad_out: Tensor, grad_lse: "Tensor | None", out: Tensor, lse: Tensor,
    query: Tensor, key: Tensor, value: Tensor, mask: "Tensor | None",
    key_lengths: "Tensor | None", seed: "Tensor | None", diagonal: "int | None",
    scale: float, dropout_p: float, offsets: list[int], mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, "Tensor | None"]:  # fmt: skip
    """With M as in _attention_kept, so that O = (P o M) V:

    dV = (P o M)^T dO; dP = M o (dO V^T); dS = P o (dP - rowsum(dO o O) + dLSE);
    dQ = scale dS K; dK = scale dS^T Q; dmask = dS, summed over the dimensions it broadcasts.

    P = exp(S - LSE), so that O and LSE may be of rows that have more keys than are given here.
    """
    q, k, v = _attention_operands(query, key, value, key_lengths)
    hidden = attention_hidden(query, key, mask, key_lengths, diagonal)
    scores = _attention_scores(q, k, mask, hidden, scale)
    weights = (scores - lse[..., None]).exp().masked_fill(hidden, 0)
    grad_out = grad_out.to(q.dtype)
    kept = _attention_kept(scores, seed, dropout_p, offsets)
    grad_v = (weights * kept).mT @ grad_out
    grad_weights = kept * (grad_out @ v.mT)
    shift = (grad_out * out).sum(-1)  # = rowsum(P o dP)
    if grad_lse is not None:
        shift = shift - grad_lse
    grad_scores = weights * (grad_weights - shift[..., None])
    grad_q, grad_k = scale * (grad_scores @ k), scale * (grad_scores.mT @ q)
    grouped = (*key.shape[:2], -1, *key.shape[2:])  # (B, Hkv, H / Hkv, Nk, D)
    grads = (
        _bnhd(grad_q, query.dtype),
        _bnhd(grad_k.view(grouped).sum(2), key.dtype),
        _bnhd(grad_v.view(grouped).sum(2), value.dtype),
    )
    if mask is None or not mask_grad:
        return *grads, None
    return *grads, grad_scores.sum_to_size(mask.shape).to(mask.dtype)


# --- Dropout (Srivastava et al. 2014; kept elements are scaled, so that inference needs nothing) --


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _dropped_rows(tensor: Tensor, seed: "Tensor | None", p: float, tag: int) -> Tensor:
    """keep / (1 - p) times a tensor of rows; what is dropped gives 0 whatever it held."""
    if seed is None:
        return tensor
    columns = tensor.shape[-1] if tensor.dim() else 1
    keep = rng.rows_keep(seed, p, tensor.numel() // columns, columns, tag).view(tensor.shape)
    return torch.where(keep, tensor / (1 - p), 0)


def dropout_fwd(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x o keep / (1 - p)."""
    out = _dropped_rows(x.to(_compute_dtype(x)), seed, p, rng.DROPOUT)
    return out.to(x.dtype).contiguous()


def dropout_bwd(grad_out: Tensor, seed: Tensor, p: float) -> Tensor:
    """dx = dout o keep / (1 - p): the forward's own formula."""
    return dropout_fwd(grad_out, seed, p)


# --- Dropout + add + layer norm (Ba et al. 2016) or RMS norm (Zhang & Sennrich 2019) --------------


def _norm_operand(
    x: Tensor, residual: "Tensor | None", seed: "Tensor | None", p: float, z_dtype: torch.dtype
) -> Tensor:
    """z = residual + dropout(x), rounded to its dtype, to compute with."""
    dtype = _compute_dtype(x)
    z = _dropped_rows(x.to(dtype), seed, p, rng.DROPOUT_ADD_NORM)
    if residual is not None:
        z = z + residual
    return z.to(z_dtype).to(dtype)


def dropout_add_layer_norm_fwd(
    x: Tensor,
    residual: "Tensor | None",
    weight: "Tensor | None",
    bias: "Tensor | None",
    seed: "Tensor | None",
    dropout_p: float,
    eps: float,
    is_rms_norm: bool,
    prenorm: bool,
    z_dtype: torch.dtype,
) -> tuple[Tensor, "Tensor | None", "Tensor | None", Tensor]:
    """y = weight (z - mean(z)) rstd + bias, rstd = 1 / sqrt(mean((z - mean(z))^2) + eps).

    RMS norm has no mean: y = weight z rstd + bias, rstd = 1 / sqrt(mean(z^2) + eps).
    """
    z = _norm_operand(x, residual, seed, dropout_p, z_dtype)
    mean = None if is_rms_norm else z.mean(-1)
    centred = z if mean is None else z - mean[..., None]
    rstd = 1 / (centred.square().mean(-1) + eps).sqrt()
    y = centred * rstd[..., None]
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    # z may still be x itself, and an output is a fresh tensor.
    out_z = z.to(z_dtype).clone(memory_format=torch.contiguous_format) if prenorm else None
    return y.to(x.dtype).contiguous(), out_z, mean, rstd


def dropout_add_layer_norm_bwd(
    grad_y: Tensor,
    grad_z: "Tensor | None",
    source: Tensor,
    residual: "Tensor | None",
    weight: "Tensor | None",
    bias: "Tensor | None",
    seed: "Tensor | None",
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    is_rms_norm: bool,
    prenorm: bool,
    z_dtype: torch.dtype,
    residual_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, "Tensor | None", "Tensor | None", "Tensor | None"]:
    """With n = (z - mean) rstd and g = dy o weight:

    dz' = rstd (g - mean(g) - n mean(g o n)) + dz; dresidual = dz'; dx = dz' o keep / (1 - p);
    dweight = sum over rows of dy o n; dbias = sum over rows of dy. RMS norm has no mean(g).
    """
    dtype = _compute_dtype(source)
    z = source.to(dtype)
    if not prenorm:
        z = _norm_operand(source, residual, seed, dropout_p, z_dtype)
    normed = (z if is_rms_norm else z - mean[..., None]) * rstd[..., None]
    upstream = grad_y.to(dtype)
    grad_normed = upstream if weight is None else upstream * weight
    grad = grad_normed - normed * (grad_normed * normed).mean(-1, keepdim=True)
    if not is_rms_norm:
        grad = grad - grad_normed.mean(-1, keepdim=True)
    grad = grad * rstd[..., None]
    if grad_z is not None:
        grad = grad + grad_z
    grad_x = _dropped_rows(grad, seed, dropout_p, rng.DROPOUT_ADD_NORM)
    rows = (-1, source.shape[-1])
    grad_weight = grad_bias = None
    if weight is not None and weight_grad:
        grad_weight = (upstream * normed).reshape(rows).sum(0).to(weight.dtype)
    if bias is not None and bias_grad:
        grad_bias = upstream.reshape(rows).sum(0).to(bias.dtype)
    return (
        grad_x.to(grad_y.dtype).contiguous(),
        grad.to(z_dtype).clone(memory_format=torch.contiguous_format) if residual_grad else None,
        grad_weight,
        grad_bias,
    )


# --- Bias + activation + dropout (GELU: Hendrycks & Gimpel 2016; SiLU: Elfwing et al. 2017) -------


def _activation(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(z) and act'(z)."""
    if activation == "relu":
        return z.relu(), (z > 0).to(z.dtype)
    if activation == "silu":  # z s(z), s the logistic function: 1 - s(z) = s(-z)
        return z * z.sigmoid(), z.sigmoid() * (1 + z * (-z).sigmoid())
    if activation == "gelu":  # z Phi(z), Phi(z) = P(X <= z) of a standard normal X
        cdf = torch.erfc(z * -math.sqrt(0.5)) / 2
        return z * cdf, cdf + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    # z (1 + tanh u) / 2 with u = sqrt(2 / pi) (z + 0.044715 z^3), and (1 + tanh u) / 2 = s(2 u).
    twice, slope = (2 * math.sqrt(2 / math.pi) * (1 + k * 0.044715 * z * z) for k in (1, 3))
    s, rest = (z * twice).sigmoid(), (-z * twice).sigmoid()
    return z * s, s + z * s * rest * slope


def _biased(x: Tensor, bias: "Tensor | None") -> Tensor:
    z = x.to(_compute_dtype(x))
    return z if bias is None else z + bias


def bias_activation_fwd(
    x: Tensor, bias: "Tensor | None", seed: "Tensor | None", activation: str, dropout_p: float
) -> Tensor:
    """act(x + bias) o keep / (1 - p)."""
    out = _activation(_biased(x, bias), activation)[0]
    return _dropped_rows(out, seed, dropout_p, rng.BIAS_ACTIVATION).to(x.dtype).contiguous()


def bias_activation_bwd(
    grad_out: Tensor,
    x: Tensor,
    bias: "Tensor | None",
    seed: "Tensor | None",
    activation: str,
    dropout_p: float,
    bias_grad: bool,
) -> tuple[Tensor, "Tensor | None"]:
    """dx = (dout o keep / (1 - p)) o act'(x + bias); dbias = dx, summed over rows."""
    z = _biased(x, bias)
    grad = _dropped_rows(grad_out.to(z.dtype), seed, dropout_p, rng.BIAS_ACTIVATION)
    grad = grad * _activation(z, activation)[1]
    grad_bias = None
    if bias is not None and bias_grad:
        grad_bias = grad.reshape(-1, x.shape[-1]).sum(0).to(bias.dtype)
    return grad.to(x.dtype).contiguous(), grad_bias


# --- Cross-entropy with label smoothing (Szegedy et al. 2016) and class weights -------------------


def _targets(
    logits: Tensor, target: Tensor, weight: "Tensor | None", ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Which rows are ignored, which have a bad target, the targets that can index, the class
    weights (V,), and the weight of each row: w_t, or 0 where it is ignored or bad."""
    ignored = target == ignore_index
    bad = ((target < 0) | (target >= logits.shape[-1])) & ~ignored
    index = target.masked_fill(ignored | bad, 0).long()
    if weight is None:
        weight = logits.new_ones(logits.shape[-1])
    weight = weight.to(_compute_dtype(logits))
    return ignored, bad, index, weight, weight[index].masked_fill(ignored | bad, 0)


def cross_entropy_fwd(
    logits: Tensor, target: Tensor, weight: "Tensor | None", ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """With LSE = log sum_j exp(x_j) and w the class weights, a row with target t has the loss

    (1 - smoothing) w_t (LSE - x_t) + smoothing / V sum_j w_j (LSE - x_j).

    Gives losses, rows' weights w_t and LSE. An ignored row has 0, 0; one with a bad target NaN, 0.
    """
    x = logits.to(_compute_dtype(logits))
    ignored, bad, index, weight, row_weights = _targets(logits, target, weight, ignore_index)
    surprise = -x.log_softmax(-1)  # LSE - x, exact even where LSE is large
    losses = (1 - smoothing) * row_weights * surprise.gather(-1, index[..., None])[..., 0]
    if smoothing > 0:
        losses = losses + smoothing / x.shape[-1] * (weight * surprise).sum(-1)
    losses = losses.masked_fill(ignored, 0).masked_fill(bad, torch.nan)
    return losses, row_weights, x.logsumexp(-1)


def cross_entropy_bwd(
    grad_losses: Tensor,
    lse: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: "Tensor | None",
    ignore_index: int,
    smoothing: float,
    overwrite: bool = False,
) -> Tensor:
    """dx_j = dloss (A softmax(x)_j - (1 - smoothing) w_t [j = t] - smoothing / V w_j), where

    A = (1 - smoothing) w_t + smoothing / V sum_j w_j. Written over the logits if asked.
    """
    x = logits.to(_compute_dtype(logits))
    ignored, bad, index, weight, row_weights = _targets(logits, target, weight, ignore_index)
    uniform = smoothing / x.shape[-1] * weight
    share = (1 - smoothing) * row_weights[..., None]
    grad = (share + uniform.sum()) * torch.exp(x - lse[..., None]) - uniform
    grad = grad.scatter_add(-1, index[..., None], -share) * grad_losses[..., None]
    grad = grad.masked_fill(ignored[..., None], 0).masked_fill(bad[..., None], torch.nan)
    return logits.copy_(grad) if overwrite else grad.to(logits.dtype).contiguous()
