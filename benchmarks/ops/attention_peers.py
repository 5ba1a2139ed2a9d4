"""Attention of other packages, each called as its documentation says; (B, H, N, D) in and out."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fusedformer.benchmarks.ops import common
from fusedformer.benchmarks.ops.common import Impl


def _refuses(
    module: str, *, dropout: bool, gqa: bool = True, bits: "int | None" = 16, gpu: bool = True
) -> Callable[[Any], "str | None"]:
    """What common.needs() refuses, and sequences of unequal lengths, which are not asked of it."""
    needs = common.needs(module, gpu=gpu, dropout=dropout, bits=bits)

    def refuses(case: Any) -> "str | None":
        if case.padded:
            return "key lengths are not measured here"
        if case.group > 1 and not gqa:
            return "it takes no grouped heads"
        return needs(case)

    return refuses


def _rows_of_heads(function: Callable[..., Any], **options: Any) -> Callable[..., Tensor]:
    """A function of (B, N, H, D) tensors as one of (B, H, N, D), which costs no copy."""

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        out = function(query, key, value, **options)
        # Some versions also return the LSE; one returns (B, N, H D).
        return (out[0] if isinstance(out, tuple) else out).view(query.shape).transpose(1, 2)

    return call


def _flex(case: Any) -> Callable[..., Tensor]:
    module = importlib.import_module("torch.nn.attention.flex_attention")
    mask = None
    if case.causal:
        mask = module.create_block_mask(
            lambda b, h, i, j: j <= i, None, None, case.seq, case.seq, device=case.device
        )
    return functools.partial(
        common.compiled(module.flex_attention), block_mask=mask, enable_gqa=case.group > 1
    )


def _flash_2(case: Any) -> Callable[..., Tensor]:
    function = importlib.import_module("flash_attn").flash_attn_func
    return _rows_of_heads(function, dropout_p=case.dropout_p, causal=case.causal)


def _flash_3(case: Any) -> Callable[..., Tensor]:
    function = importlib.import_module("flash_attn_interface").flash_attn_func
    return _rows_of_heads(function, causal=case.causal)


def _flash_4(case: Any) -> Callable[..., Tensor]:
    function = importlib.import_module("flash_attn.cute").flash_attn_func
    return _rows_of_heads(function, causal=case.causal)


def _xformers(case: Any) -> Callable[..., Tensor]:
    ops = importlib.import_module("xformers.ops")
    bias = ops.LowerTriangularMask() if case.causal else None
    return _rows_of_heads(ops.memory_efficient_attention, attn_bias=bias, p=case.dropout_p)


def _transformer_engine(case: Any) -> Callable[..., Tensor]:
    module = importlib.import_module("transformer_engine.pytorch")
    layer = module.DotProductAttention(
        case.heads,
        case.head_dim,
        num_gqa_groups=case.kv_heads or case.heads,
        attention_dropout=case.dropout_p,
        qkv_format="bshd",
        attn_mask_type="causal" if case.causal else "no_mask",
    )
    return _rows_of_heads(layer)


def _x_transformers(case: Any) -> Callable[..., Tensor]:
    module = importlib.import_module("x_transformers.attend")
    layer = module.Attend(dropout=case.dropout_p, causal=case.causal)
    return lambda query, key, value: layer(query, key, value)[0]


IMPLS = {
    "flex": Impl(
        "torch's FlexAttention, compiled",
        _flex,
        _refuses("torch.nn.attention.flex_attention", dropout=False, bits=None),
        compiles=True,
    ),
    "flash-attn-2": Impl(
        "flash_attn_func of flash-attn 2",
        _flash_2,
        _refuses("flash_attn.flash_attn_interface", dropout=True),
        "flash-attn",
    ),
    "flash-attn-3": Impl(
        "flash_attn_func of flash-attn 3",
        _flash_3,
        _refuses("flash_attn_interface", dropout=False),
        "flash_attn_3",
    ),
    "flash-attn-4": Impl(
        "flash_attn_func of flash-attn 4 (CuTe DSL)",
        _flash_4,
        _refuses("flash_attn.cute", dropout=False),
        "flash-attn-4",
    ),
    "xformers": Impl(
        "memory_efficient_attention of xFormers",
        _xformers,
        _refuses("xformers.ops", dropout=True, gqa=False),
        "xformers",
    ),
    "transformer-engine": Impl(
        "DotProductAttention of TransformerEngine",
        _transformer_engine,
        _refuses("transformer_engine.pytorch", dropout=True),
        "transformer-engine",
    ),
    "x-transformers": Impl(
        "Attend of x-transformers, without its flash option",
        _x_transformers,
        _refuses("x_transformers.attend", dropout=True, gqa=False, bits=None, gpu=False),
        "x-transformers",
    ),
}
