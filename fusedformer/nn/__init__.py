"""torch.nn's Transformer modules on fused kernels: the same arguments, attributes and state_dicts.

Each takes the place of its namesake in ``torch.nn``, whose state_dict it loads and whose results it
gives, up to rounding; where it differs, its docstring says so.
"""

from fusedformer.nn.attention import MultiheadAttention
from fusedformer.nn.layers import Dropout, DropoutAddLayerNorm, LayerNorm, RMSNorm
from fusedformer.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from fusedformer.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "CrossEntropyLoss",
    "Dropout",
    "DropoutAddLayerNorm",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RMSNorm",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
