"""Which modules fuse() knows, what it makes of them, and which options of theirs it refuses."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import CrossEntropyLoss, Dropout, LayerNorm, MultiheadAttention, RMSNorm

from fusedformer.integrations import layers
from fusedformer.kernels.attention import MAX_HEAD_DIM


@dataclass(frozen=True)
class Rule:
    """How modules of one class are fused."""

    fused: type  # a subclass of it
    what: str  # for the report
    op: str  # whose kernels it needs
    parts: dict[str, type] = field(default_factory=dict)  # children whose work it does itself
    # Why not this module, for what it is or for where it lies; or None.
    refuse: Callable[[Any, torch.device], "str | None"] = lambda module, device: None


# Below it, on a CPU, what a call costs beside its arithmetic is more than our norm saves; RMS norm,
# of which torch has no kernel there, saves more.
_NARROW = 512


def _refuse_norm(module: LayerNorm, device: torch.device) -> "str | None":
    if device.type == "cpu" and math.prod(module.normalized_shape) < _NARROW:
        return f"it has fewer than {_NARROW} features, and on a CPU ours is no faster there"
    return None


def _refuse_dropout(module: Dropout, device: torch.device) -> "str | None":
    if module.inplace:
        return "inplace=True, and ours makes a new tensor"
    return "p is 0" if module.p == 0 else None


def _refuse_attention(module: MultiheadAttention, device: torch.device) -> "str | None":
    if module.head_dim > MAX_HEAD_DIM:
        return f"its head dimension, {module.head_dim}, is over {MAX_HEAD_DIM}"
    return None


CHAIN = "dropout + residual + layer norm"
NORM = "dropout_add_layer_norm"


def _parts(count: int) -> dict[str, type]:
    numbers = range(1, count + 1)
    parts: dict[str, type] = {f"norm{number}": LayerNorm for number in numbers}
    return parts | {f"dropout{number}": Dropout for number in numbers} | {"dropout": Dropout}


RULES: dict[type, Rule] = {
    LayerNorm: Rule(layers.LayerNorm, "layer norm", NORM, refuse=_refuse_norm),
    RMSNorm: Rule(layers.RMSNorm, "RMS norm", NORM),
    Dropout: Rule(layers.Dropout, "dropout", "dropout", refuse=_refuse_dropout),
    MultiheadAttention: Rule(
        layers.MultiheadAttention, "attention", "attention", refuse=_refuse_attention
    ),
    CrossEntropyLoss: Rule(layers.CrossEntropyLoss, "cross-entropy", "cross_entropy"),
    torch.nn.TransformerEncoderLayer: Rule(layers.TransformerEncoderLayer, CHAIN, NORM, _parts(2)),
    torch.nn.TransformerDecoderLayer: Rule(layers.TransformerDecoderLayer, CHAIN, NORM, _parts(3)),
}
