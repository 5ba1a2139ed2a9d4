"""torch.nn's Transformer modules on fused kernels: the same arguments, attributes and state_dicts.

Each takes the place of its namesake in ``torch.nn``, whose state_dict it loads and whose results it
gives, up to rounding; where it differs, its docstring says so.
"""

from fusedformer.nn.attention import MultiheadAttention
from fusedformer.nn.layers import Dropout, DropoutAddLayerNorm, LayerNorm, RMSNorm

__all__ = [
    "Dropout",
    "DropoutAddLayerNorm",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
]
