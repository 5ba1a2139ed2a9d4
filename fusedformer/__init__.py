"""Fused attention, layer norm, dropout and cross-entropy kernels for the standard Transformer.

What ``__all__`` names is public, and is deprecated for one release before it goes.
"""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels" / "dispatch.py").is_file():
    # A checkout keeps kernels/, transformer/ and benchmarks/ beside this folder; an installed
    # copy has them inside it.
    __path__.append(str(_here.parent))

from fusedformer import nn
from fusedformer.integrations.fuse import fuse, unfuse
from fusedformer.kernels import flops as _flops
from fusedformer.kernels.activation import bias_activation
from fusedformer.kernels.attention import attention
from fusedformer.kernels.cross_entropy import cross_entropy
from fusedformer.kernels.dispatch import available_backends, use_backend
from fusedformer.kernels.dropout import dropout
from fusedformer.kernels.layer_norm import dropout_add_layer_norm, layer_norm, rms_norm
from fusedformer.kernels.linear_cross_entropy import linear_cross_entropy
from fusedformer.kernels.sdpa import scaled_dot_product_attention
from fusedformer.transformer.bert import BERT, BERTConfig
from fusedformer.transformer.generate import generate
from fusedformer.transformer.gpt import GPT, GPTConfig
from fusedformer.transformer.seq2seq import Transformer, TransformerConfig
from fusedformer.transformer.vit import ViT, ViTConfig

if _TYPE_CHECKING:
    from fusedformer.integrations.sdpa import sdpa

_flops.register()


def __getattr__(name: str) -> object:
    if name == "sdpa":  # which brings torch's compiler, a second of import
        from fusedformer.integrations.sdpa import sdpa

        globals()["sdpa"] = sdpa
        return sdpa
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "BERT",
    "GPT",
    "BERTConfig",
    "GPTConfig",
    "Transformer",
    "TransformerConfig",
    "ViT",
    "ViTConfig",
    "__version__",
    "attention",
    "available_backends",
    "bias_activation",
    "cross_entropy",
    "dropout",
    "dropout_add_layer_norm",
    "fuse",
    "generate",
    "layer_norm",
    "linear_cross_entropy",
    "nn",
    "rms_norm",
    "scaled_dot_product_attention",
    "sdpa",
    "unfuse",
    "use_backend",
]
