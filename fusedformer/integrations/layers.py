"""What fuse() turns modules of torch.nn into.

Each class is a subclass of the torch class with another forward: a module keeps its parameters,
buffers, children and whatever else it has, and changes its class alone. Where a call asks for what
the kernels do not have, torch's forward runs.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

import fusedformer.nn
from fusedformer.kernels.layer_norm import dropout_add_layer_norm, layer_norm
from fusedformer.nn.transformer import _DecoderLayer, _EncoderLayer


class Fused:
    """Marks what fuse() has changed, apart from modules that were made as fusedformer.nn's."""

    original: ClassVar[type]  # the class that unfuse() gives back


def hooked(*modules: torch.nn.Module) -> bool:
    """Whether modules whose work is done without calling them have got hooks since fuse()."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in modules
    )


def dropout_add_norm(
    dropout: torch.nn.Dropout,
    norm: torch.nn.LayerNorm,
    x: Tensor,
    residual: Tensor,
    prenorm: bool = False,
) -> Any:
    """norm(residual + dropout(x)), and that sum too with prenorm, on the modules' own state."""
    p = dropout.p if dropout.training else 0.0
    if not prenorm:
        # The result goes on as the residual, which autocast keeps wider than x.
        x = x.to(torch.promote_types(x.dtype, residual.dtype))
    return dropout_add_layer_norm(x, residual, norm.weight, norm.bias, p, norm.eps, prenorm=prenorm)


class LayerNorm(Fused, fusedformer.nn.LayerNorm):
    original = torch.nn.LayerNorm


class RMSNorm(Fused, fusedformer.nn.RMSNorm):
    original = torch.nn.RMSNorm


class Dropout(Fused, fusedformer.nn.Dropout):
    original = torch.nn.Dropout


class MultiheadAttention(Fused, fusedformer.nn.MultiheadAttention):
    """Calls that ask for the weights are left to torch, which makes them on its way."""

    original = torch.nn.MultiheadAttention

    # Torch's own arguments, without what fusedformer.nn adds: that is what is ignored here.
    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: "Tensor | None" = None,
        need_weights: bool = True,
        attn_mask: "Tensor | None" = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> "tuple[Tensor, Tensor | None]":
        args = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights)
        if need_weights or query.is_nested:
            return torch.nn.MultiheadAttention.forward(self, *args, is_causal)
        return super().forward(*args, is_causal)


class CrossEntropyLoss(Fused, fusedformer.nn.CrossEntropyLoss):
    """Class probabilities, classes that are not the last dimension, and bytes are torch's."""

    original = torch.nn.CrossEntropyLoss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if target.dtype not in (torch.int32, torch.int64) or input.dim() > 2:
            return torch.nn.CrossEntropyLoss.forward(self, input, target)
        return super().forward(input, target)


class _Layer(Fused):
    """What differs where the parts are those of torch's layers, and their dropouts modules."""

    def _first_norm(self: Any, x: Tensor) -> Tensor:
        return layer_norm(x, self.norm1.weight, self.norm1.bias, self.norm1.eps)

    def _add_norm(self: Any, number: int, x: Tensor, residual: Tensor) -> Any:
        # In pre-norm the norm is that of the next sublayer.
        dropout = getattr(self, f"dropout{number - self.norm_first}")
        norm = getattr(self, f"norm{number}")
        return dropout_add_norm(dropout, norm, x, residual, prenorm=self.norm_first)


class TransformerEncoderLayer(_Layer, _EncoderLayer, torch.nn.TransformerEncoderLayer):
    """Dropout, residual and norm are one kernel; so are bias, activation and dropout."""

    original = torch.nn.TransformerEncoderLayer

    def forward(
        self,
        src: Tensor,
        src_mask: "Tensor | None" = None,
        src_key_padding_mask: "Tensor | None" = None,
        is_causal: bool = False,
    ) -> Tensor:
        parts = self.norm1, self.norm2, self.dropout, self.dropout1, self.dropout2
        torchs = src.is_nested or hooked(*parts)
        forward = torch.nn.TransformerEncoderLayer.forward if torchs else _EncoderLayer.forward
        return forward(self, src, src_mask, src_key_padding_mask, is_causal)


class TransformerEncoder(Fused, torch.nn.TransformerEncoder):
    """Makes no nested tensors of padded batches, which the kernels of its layers do not take."""

    original = torch.nn.TransformerEncoder

    # The module's own value stays where it is, for unfuse().
    @property
    def use_nested_tensor(self) -> bool:
        return False

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value


class TransformerDecoderLayer(_Layer, _DecoderLayer, torch.nn.TransformerDecoderLayer):
    """As TransformerEncoderLayer."""

    original = torch.nn.TransformerDecoderLayer

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: "Tensor | None" = None,
        memory_mask: "Tensor | None" = None,
        tgt_key_padding_mask: "Tensor | None" = None,
        memory_key_padding_mask: "Tensor | None" = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        norms = self.norm1, self.norm2, self.norm3
        torchs = hooked(*norms, self.dropout, self.dropout1, self.dropout2, self.dropout3)
        forward = torch.nn.TransformerDecoderLayer.forward if torchs else _DecoderLayer.forward
        return forward(
            self, tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask,
            memory_key_padding_mask, tgt_is_causal, memory_is_causal,
        )  # fmt: skip
