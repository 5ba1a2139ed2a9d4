"""torch's scaled_dot_product_attention, arguments and rules alike, on attention's kernels."""

import torch
from torch import Tensor

from fusedformer.kernels.attention import checked_attention
from fusedformer.kernels.attention_plain import attention_plain
from fusedformer.kernels.checks import check_floating, shape


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: "Tensor | None" = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: "float | None" = None,
    enable_gqa: bool = False,
    *,
    backend: "str | None" = None,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` on our kernels; see attention().

    The arguments, their order and the causal rule are torch's: query i sees keys j <= i (top-left
    aligned). Leading dimensions may be any number and broadcast; value may have another head
    dimension.

    Args:
        query: (..., H, Nq, D). key: (..., Hkv, Nk, D). value: (..., Hkv, Nk, Dv).
        attn_mask: broadcastable to (..., H, Nq, Nk), bool (True = attend) or additive.

    Returns:
        (..., H, Nq, Dv).

    Raises:
        ValueError, TypeError: as attention(); also attn_mask together with is_causal, or leading
            dimensions that do not broadcast, such as unlike head counts without enable_gqa.
    """
    name = "scaled_dot_product_attention"
    if attn_mask is not None and is_causal:
        raise ValueError(f"{name}: attn_mask must be None when is_causal is set")
    if (
        attn_mask is None and backend is None and not torch.compiler.is_compiling()
        and type(query) is type(key) is Tensor and not query.is_nested
        and query.shape == key.shape
    ):  # fmt: skip
        # As many keys as queries, and of heads: all rules are attention()'s, the causal one, too.
        out = attention_plain(query, key, value, is_causal, scale, dropout_p)
        if out is not None:
            return out
    own = 3 if enable_gqa else 2  # dimensions that do not broadcast: heads only without groups
    for label, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating(name, label, tensor)
        if tensor.dim() < own:
            raise ValueError(
                f"{name}: {label} must have {own} dimensions or more; got {shape(tensor)}"
            )
    if not query.shape[:-own] == key.shape[:-own] == value.shape[:-own]:
        query, key, value = _broadcast(name, own, query, key, value)
    lead = query.shape[:-2]
    dim, value_dim = query.shape[-1], value.shape[-1]
    scale = dim**-0.5 if scale is None else scale
    if attn_mask is not None:
        attn_mask = _mask_as_4d(name, attn_mask, query, key)
    if query.dim() != 4:
        # (B, N, D) without groups is B independent problems, not B heads of one.
        single = query.dim() == 3 and key.shape[0] == query.shape[0]
        query, key, value = (t[:, None] if single else _as_4d(t) for t in (query, key, value))
    if value_dim != dim:
        # Zero columns change neither the scores nor, cut off again, the output.
        wide = max(dim, value_dim)
        query, key, value = (
            torch.nn.functional.pad(t, (0, wide - t.shape[-1])) for t in (query, key, value)
        )
    out, _ = checked_attention(
        name, query, key, value, attn_mask, None, "first" if is_causal else False, scale,
        dropout_p, None, None, backend, mask_name="attn_mask",
    )  # fmt: skip
    if len(lead) == 2 and value_dim == dim:
        return out
    return out[..., :value_dim].reshape(*lead, *out.shape[-2:-1], value_dim)


def _broadcast(name: str, own: int, *tensors: Tensor) -> "list[Tensor]":
    """The tensors with their leading dimensions, all but the last ``own``, broadcast: views."""
    try:
        lead = torch.broadcast_shapes(*(tensor.shape[:-own] for tensor in tensors))
    except RuntimeError:
        heads = ", heads only with enable_gqa" if own == 2 else ""
        raise ValueError(
            f"{name}: the leading dimensions of query, key and value must be the same or 1{heads}; "
            f"got {', '.join(map(shape, tensors))}"
        ) from None
    return [tensor.expand(*lead, *tensor.shape[-own:]) for tensor in tensors]


def _as_4d(tensor: Tensor) -> Tensor:
    """(..., H, N, D) as (B, H, N, D)."""
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() > 4:
        return tensor.flatten(0, -4)
    return tensor[(None,) * (4 - tensor.dim())]


def _mask_as_4d(name: str, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask for query as _as_4d gives it."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: attn_mask must be a tensor; got {type(mask).__name__}")
    wanted = (*query.shape[:-1], key.shape[-2])
    sizes = (1,) * (len(wanted) - mask.dim()) + tuple(mask.shape)
    if mask.dim() > len(wanted) or any(
        size not in (1, full) for size, full in zip(sizes, wanted, strict=True)
    ):
        raise ValueError(f"{name}: attn_mask must broadcast to {wanted}; got {shape(mask)}")
    if query.dim() > 4 and mask.dim() > 3:
        # Leading dimensions are flattened into one, which the mask must then fill.
        return mask.expand(*query.shape[:-3], *mask.shape[-3:]).flatten(0, -4)
    if query.dim() == 3 and mask.dim() == 3 and key.shape[0] == query.shape[0]:
        return mask[:, None]
    return mask
