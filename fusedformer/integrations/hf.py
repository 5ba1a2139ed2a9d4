"""Hugging Face transformers: ``attn_implementation="fusedformer"``, after register().

Both interfaces are those of transformers >= 5: a function for attention, one for its masks.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from fusedformer.kernels.attention import checked_attention

try:  # private, and new in transformers 5
    from transformers.utils.output_capturing import _active_collector as _collector
except ImportError:
    _collector = None

NAME = "fusedformer"

# Arguments that some models pass and that change the result; transformers' other implementations
# take some of them, which the messages say.
_REFUSED = {
    "softcap": "capped scores (softcap)",
    "s_aux": "attention sinks (s_aux)",
    "sinks": "attention sinks",
    "cache": "the paged cache of continuous batching",
    "indices": "attention to chosen keys (indices)",
    "block_indices": "attention to chosen blocks (block_indices)",
    "head_mask": "a head mask",
}


def register() -> None:
    """Makes ``attn_implementation="fusedformer"`` known to transformers; again does no harm."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


class Switched:
    """What fuse() leaves in modules whose config names our attention.

    Unpickled with one of them, perhaps in another process, it makes our attention known there.
    """

    def __init__(self, before: "dict[str, Any] | None" = None) -> None:
        register()
        self.before = before  # of a model: what its attention was, by part of its config

    def __reduce__(self) -> "tuple[Any, ...]":
        return Switched, (self.before,)


class _Padding(NamedTuple):
    """What a mask says, kept beside it in a form that costs less."""

    keys: "Tensor | None"  # (B, 1, 1, Nk) bool, True = attend; None where lengths say all
    lengths: Tensor  # (B,) int32: keys past it are all hidden
    causal: bool


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: "Tensor | None" = None,
    **kwargs: Any,
) -> "Tensor | None":
    """The mask of one forward pass, (B, 1, Nq, Nk) bool (True = attend), or None for none.

    It is what ``sdpa`` has. Where it is padding and the causal rule alone, it carries these with
    it, and attention reads them in its place: no N^2 mask, and blocks of padding are skipped. What
    a model makes of the mask, a slice or a sum, carries them no longer, and is used as it is.
    """
    mask = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        **kwargs,
    )  # fmt: skip
    if mask is None or attention_mask is None:
        return mask
    plain = mask_function in (causal_mask_function, bidirectional_mask_function)
    # Both begin at the same place, as in torch's causal rule and ours below; static caches bring a
    # tensor, which is not read.
    aligned = isinstance(q_offset, int) and q_offset == kv_offset == 0
    if plain and aligned and attention_mask.shape == (batch_size, kv_length):
        causal = mask_function is causal_mask_function
        mask.fusedformer = _padding(attention_mask, causal)
    return mask


def _padding(attended: Tensor, causal: bool) -> _Padding:
    """Of a (B, Nk) mask."""
    positions = torch.arange(1, attended.shape[1] + 1, device=attended.device, dtype=torch.int32)
    lengths = (attended * positions).amax(1)
    # Right padding? Only on a CPU does reading the answer cost nothing.
    can_read = attended.device.type == "cpu" and not torch.compiler.is_compiling()
    if can_read and torch.equal(attended.sum(1), lengths.long()):
        return _Padding(None, lengths, causal)
    return _Padding(attended[:, None, None, :], lengths, causal)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: "Tensor | None",
    dropout: float = 0.0,
    scaling: "float | None" = None,
    is_causal: "bool | None" = None,
    position_bias: "Tensor | None" = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the attention layer; its ``is_causal`` counts where is_causal is None.
        query: (B, H, Nq, D). key, value: (B, Hkv, Nk, D), never repeated for grouped queries; value
            may have another head dimension.
        attention_mask: (B, 1 or H, Nq, Nk), bool or additive; None with a causal layer means the
            causal rule, aligned at the first key.
        position_bias: added to the scores, (1 or B, H, Nq, Nk); gets its gradient.

    Returns:
        (B, Nq, H, D) contiguous, and None for the weights, which are never made.

    Raises:
        ValueError: an argument that would change the result and that our kernels do not have.
    """
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f'attn_implementation="{NAME}" has no {what}; call '
                f'model.set_attn_implementation("eager") for {type(module).__name__}'
            )
    if kwargs.get("output_attentions") or _weights_are_awaited():
        raise ValueError(
            f'attn_implementation="{NAME}" never makes the attention weights; for '
            'output_attentions=True, call model.set_attn_implementation("eager")'
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # One query is the last one, and sees all keys.
    causal = query.shape[2] > 1 and attention_mask is None and causal
    lengths = None
    padding = getattr(attention_mask, NAME, None)
    if padding is not None:
        attention_mask, lengths, causal = padding
        causal = causal and query.shape[2] > 1
    if position_bias is not None:
        attention_mask = _biased(attention_mask, position_bias, key.shape[2])
    dim, value_dim = query.shape[3], value.shape[3]
    if value_dim != dim:
        # Zero columns change neither the scores nor, cut off again, the output.
        wide = max(dim, value_dim)
        scaling = dim**-0.5 if scaling is None else scaling
        query, key, value = (
            torch.nn.functional.pad(t, (0, wide - t.shape[3])) for t in (query, key, value)
        )
    out, _ = checked_attention(
        f'attn_implementation="{NAME}"', query, key, value, attention_mask, lengths,
        "first" if causal else False, scaling, dropout, None, None, None,
        mask_name="attention_mask",
    )  # fmt: skip
    return out[..., :value_dim].transpose(1, 2).contiguous(), None


def _weights_are_awaited() -> bool:
    """Whether a model above collects the weights that its attention layers return.

    Some models ask for them so alone, and would find none. Compiled code cannot be asked.
    """
    if _collector is None or torch.compiler.is_compiling():
        return False
    return any(name.endswith("attentions") for name in _collector.get() or ())


def _biased(mask: "Tensor | None", bias: Tensor, keys: int) -> Tensor:
    """Mask and bias as one additive mask."""
    bias = bias[..., :keys]
    if mask is None:
        return bias
    return torch.where(mask, bias, -math.inf) if mask.dtype == torch.bool else bias + mask
