"""The calls of bias_activation and of the losses that ``fusedformer aot`` compiles; see aot_cases.

A configuration depends on dtypes, on the width (or the number of classes) and whether rows start on
16-byte boundaries, and on what is there: bias, dropout, class weights, smoothing.
"""

from functools import partial
from itertools import product

import torch
from torch import Tensor

from fusedformer.aot_cases import DTYPES, Case, meta

CASES: dict[str, Case] = {}


def _add(name: str, dtype: torch.dtype, quick: bool, call: partial) -> None:
    CASES[name] = Case(16 if dtype.itemsize == 2 else 32, quick, call)


# --- bias_activation ------------------------------------------------------------------------------

# Each number of columns that a tile can have, and rows that are not aligned.
ACTIVATION_SHAPES = (
    (4096, 1),
    (4096, 16),
    (4096, 17),
    (4096, 64),
    (4096, 100),
    (4096, 3072),
    (4096, 4001),
    (1, 16384),
    (1, 16001),
)
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
# What CI compiles of them, all in bfloat16.
ACTIVATION_QUICK = {
    (3072, "gelu", "all"),
    (3072, "gelu_tanh", "all"),
    (3072, "relu", "plain"),
    (3072, "silu", "frozen"),
    (4001, "gelu", "all"),
    (16384, "gelu", "all"),
}


def _bias_activation(
    dtype: torch.dtype, rows: int, width: int, activation: str, flags: str
) -> None:
    from fusedformer.kernels.triton import activation as backend

    x = meta(rows, width, dtype=dtype)
    # Parameters in float32 beside 16-bit activations are met as well as those of x's own dtype.
    bias_dtype = torch.float32 if flags == "all" else dtype
    bias = None if flags == "plain" else meta(width, dtype=bias_dtype)
    seed, p = (meta(dtype=torch.int64), 0.1) if flags == "all" else (None, 0.0)
    args = (x, bias, seed, activation, p)
    out = backend.bias_activation_fwd(*args)
    backend.bias_activation_bwd(out, *args, flags == "all")


def _add_activations() -> None:
    flags_of = ("plain", "frozen", "all")
    for (name, dtype), (rows, width), activation, flags in product(
        DTYPES.items(), ACTIVATION_SHAPES, ACTIVATIONS, flags_of
    ):
        quick = name == "bf16" and (width, activation, flags) in ACTIVATION_QUICK
        call = partial(_bias_activation, dtype, rows, width, activation, flags)
        _add(f"bias_activation-{name}-{rows}x{width}-{activation}-{flags}", dtype, quick, call)


# --- cross_entropy --------------------------------------------------------------------------------

TOKENS = 2048
# Each number of columns of a narrow tile, the first widths of the two wide ones, and usual
# vocabularies; 1001, 4095, 5001 and 50257 are odd.
CLASSES = (
    *(2, 10, 16, 32, 64, 100, 256, 512, 1000, 1001, 2048, 4095, 4096),
    *(4104, 5001, 16383, 16384, 32000, 50257, 128256),
)
# Rows next to each other, and rows that are a part of longer ones: the gradient's are not.
LAYOUTS = ("dense", "view")
LOSS_FLAGS = ("plain", "smoothing", "weight", "all")
LOSS_QUICK = {
    (1000, "dense", "plain"),
    (1001, "dense", "all"),
    (50257, "dense", "all"),
    (32000, "dense", "plain"),
    (32000, "view", "all"),
    (50257, "view", "plain"),
}


def _loss_options(
    dtype: torch.dtype, classes: int, flags: str
) -> tuple[Tensor, "Tensor | None", int, float]:
    """target, weight, ignore_index and smoothing."""
    everything = flags == "all"
    target = meta(TOKENS, dtype=torch.int32 if everything else torch.int64)
    weight_dtype = torch.float32 if everything else dtype
    weight = meta(classes, dtype=weight_dtype) if flags in ("weight", "all") else None
    return target, weight, -100, 0.1 if flags in ("smoothing", "all") else 0.0


def _cross_entropy(dtype: torch.dtype, classes: int, layout: str, flags: str) -> None:
    from fusedformer.kernels.triton import cross_entropy as backend

    pitch = classes if layout == "dense" else -(-classes // 64) * 64 + 64
    logits = meta(TOKENS, pitch, dtype=dtype)[:, :classes]
    options = _loss_options(dtype, classes, flags)
    losses, _, lse = backend.cross_entropy_fwd(logits, *options)
    backend.cross_entropy_bwd(losses, lse, logits, *options)


def _linear_cross_entropy(dtype: torch.dtype, classes: int, flags: str) -> None:
    """Logits in rows of a padded buffer, whose gradient takes their place."""
    from fusedformer.kernels import linear_cross_entropy as op

    x = meta(TOKENS, 64, dtype=dtype)
    linear_weight = meta(classes, 64, dtype=dtype)
    linear_bias = meta(classes, dtype=dtype)
    args = (x, linear_weight, linear_bias, *_loss_options(dtype, classes, flags))
    wanted = [True, True, True]
    losses, _, lse, *_ = op._fwd(*args, wanted, "triton")
    op._bwd(losses, lse, *args, wanted, "triton")


def _add_losses() -> None:
    for (name, dtype), classes, flags in product(DTYPES.items(), CLASSES, LOSS_FLAGS):
        for layout in LAYOUTS:
            quick = name == "bf16" and (classes, layout, flags) in LOSS_QUICK
            call = partial(_cross_entropy, dtype, classes, layout, flags)
            _add(f"cross_entropy-{name}-v{classes}-{layout}-{flags}", dtype, quick, call)
        if classes >= 1000:
            quick = name == "bf16" and (classes, flags) == (50257, "plain")
            call = partial(_linear_cross_entropy, dtype, classes, flags)
            _add(f"linear_cross_entropy-{name}-v{classes}-{flags}", dtype, quick, call)


_add_activations()
_add_losses()
