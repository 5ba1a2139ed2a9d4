"""Norms and losses of other packages, each called as its documentation says."""

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fusedformer.benchmarks.ops import common
from fusedformer.benchmarks.ops.common import Impl

_EPS = 1e-5


def _first(result: Any) -> Tensor:
    """The output alone, where some versions return more."""
    return result[0] if isinstance(result, tuple) else result


def _impl(
    about: str,
    module: str,
    call: Callable[[Any, Any], Callable[..., Tensor]],
    package: str,
    *,
    dropout: bool = False,
    bits: "int | None" = None,
) -> Impl:
    """An implementation that ``call`` makes of its module and a problem."""
    return Impl(
        about,
        lambda case: call(importlib.import_module(module), case),
        common.needs(module, dropout=dropout, bits=bits),
        package,
    )


# --- Norms ----------------------------------------------------------------------------------------

ADD_NORM = {
    "flash-attn": _impl(
        "layer_norm_fn of flash-attn's Triton kernels",
        "flash_attn.ops.triton.layer_norm",
        lambda module, case: (
            lambda x, residual, weight, bias: _first(
                module.layer_norm_fn(
                    x, weight, bias, residual, eps=_EPS, dropout_p=case.dropout_p, prenorm=False
                )
            )
        ),
        "flash-attn",
        dropout=True,
    ),
}

LAYER_NORM = {
    "liger": _impl(
        "liger_layer_norm",
        "liger_kernel.transformers.functional",
        lambda module, case: lambda x, w, b: module.liger_layer_norm(x, w, b, _EPS),
        "liger-kernel",
    ),
    "apex": _impl(
        "fused_layer_norm_affine of Apex",
        "apex.normalization.fused_layer_norm",
        lambda module, case: (
            lambda x, w, b: module.fused_layer_norm_affine(x, w, b, x.shape[-1:], _EPS)
        ),
        "apex",
    ),
    "flash-attn": _impl(
        "layer_norm_fn of flash-attn's Triton kernels",
        "flash_attn.ops.triton.layer_norm",
        lambda module, case: lambda x, w, b: _first(module.layer_norm_fn(x, w, b, eps=_EPS)),
        "flash-attn",
    ),
}

RMS_NORM = {
    "quack": _impl(
        "rmsnorm of quack",
        "quack",
        lambda module, case: lambda x, w: _first(module.rmsnorm(x, w, eps=_EPS)),
        "quack-kernels",
    ),
    "liger": _impl(
        "liger_rms_norm, not in place",
        "liger_kernel.transformers.functional",
        lambda module, case: lambda x, w: module.liger_rms_norm(x, w, _EPS, in_place=False),
        "liger-kernel",
    ),
    "apex": _impl(
        "fused_rms_norm_affine of Apex",
        "apex.normalization.fused_layer_norm",
        lambda module, case: lambda x, w: module.fused_rms_norm_affine(x, w, x.shape[-1:], _EPS),
        "apex",
    ),
}


# --- Losses ---------------------------------------------------------------------------------------


def _apex_loss(module: Any, case: Any) -> Callable[..., Tensor]:
    def call(logits: Tensor, target: Tensor) -> Tensor:
        losses = module.SoftmaxCrossEntropyLoss.apply(logits, target, 0.0, -100, False)
        return losses.float().mean().to(logits.dtype)

    return call


def _flash_loss(module: Any, case: Any) -> Callable[..., Tensor]:
    def call(logits: Tensor, target: Tensor) -> Tensor:
        return _first(module.cross_entropy_loss(logits, target)).mean().to(logits.dtype)

    return call


def _same_dtype(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """A loss in its input's dtype, whatever the package returns."""

    def call(x: Tensor, *args: Tensor) -> Tensor:
        return _first(function(x, *args)).to(x.dtype)

    return call


CROSS_ENTROPY = {
    "liger": _impl(
        "liger_cross_entropy, which overwrites the logits with their gradient",
        "liger_kernel.transformers.functional",
        lambda module, case: _same_dtype(module.liger_cross_entropy),
        "liger-kernel",
    ),
    "quack": _impl(
        "cross_entropy of quack",
        "quack",
        lambda module, case: _same_dtype(module.cross_entropy),
        "quack-kernels",
    ),
    "apex": _impl("SoftmaxCrossEntropyLoss of Apex", "apex.contrib.xentropy", _apex_loss, "apex"),
    "flash-attn": _impl(
        "cross_entropy_loss of flash-attn's Triton kernels",
        "flash_attn.ops.triton.cross_entropy",
        _flash_loss,
        "flash-attn",
    ),
}

LINEAR_CROSS_ENTROPY = {
    "liger": _impl(
        "liger_fused_linear_cross_entropy",
        "liger_kernel.transformers.functional",
        lambda module, case: _same_dtype(module.liger_fused_linear_cross_entropy),
        "liger-kernel",
    ),
    "quack": _impl(
        "chunked_linear_cross_entropy of quack",
        "quack.linear_cross_entropy",
        lambda module, case: _same_dtype(module.chunked_linear_cross_entropy),
        "quack-kernels",
        bits=16,
    ),
}
