"""The backend "cpu": kernels in C++ (csrc/cpu), as PyTorch functions that the ops call.

Conventions, for every op (csrc/cpu/ops.cpp has those of the C++ side):

- ``<op>_fwd`` and ``<op>_bwd`` have the arguments and results of reference.py's and call
  ``torch.ops.fusedformer_native.<op>_fwd``, private entry points that trust what was checked.
- ``<op>_unsupported(*args)`` says why a call cannot run here, or None. An op that is not here yet
  has neither; dispatch then says so.
- Nothing is built or loaded at import: library() does that, once, the first time an op asks.
"""

import torch
from torch import Tensor

from fusedformer.kernels.native_library import (  # noqa: F401 (about: doctor asks each backend)
    about,
    dropout_options,
    entry,
    library,
)
from fusedformer.kernels.native_plain import (  # noqa: F401 (of this backend, but for short calls)
    attention_plain,
    attention_plain_bwd,
    attention_plain_fwd,
    norm_plain,
    norm_plain_bwd,
    norm_plain_fwd,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported_device(device: torch.device) -> "str | None":
    """Why these kernels cannot run on a device, or None."""
    if device.type != "cpu":
        return f"the C++ kernels run on the CPU; the tensors are on {device.type}"
    return library()[1]


def unsupported_tensors(*tensors: "Tensor | None") -> "str | None":
    """Why kernels cannot take these tensors, the first one not None; or None."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in _DTYPES:
            return f"{tensor.dtype} runs on the reference backend only"
    assert tensors[0] is not None
    return library()[1] if tensors[0].is_cpu else unsupported_device(tensors[0].device)


# --- Dropout --------------------------------------------------------------------------------------


def dropout_unsupported(x: Tensor, *args: object) -> "str | None":
    """Why the kernels cannot take a call, or None."""
    return unsupported_tensors(x)


def dropout_fwd(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """As reference.dropout_fwd."""
    return entry("dropout_fwd")(x, seed, *dropout_options(p))


def dropout_bwd(grad_out: Tensor, seed: Tensor, p: float) -> Tensor:
    """The same function of the gradient."""
    return dropout_fwd(grad_out, seed, p)


# --- Dropout + add + layer norm -------------------------------------------------------------------


def dropout_add_layer_norm_unsupported(
    x: Tensor,
    residual: "Tensor | None",
    weight: "Tensor | None",
    bias: "Tensor | None",
    *args: object,
) -> "str | None":
    """Why the kernels cannot take a call, or None."""
    return unsupported_tensors(x, residual, weight, bias)


def dropout_add_layer_norm_fwd(
    x: Tensor,
    residual: "Tensor | None",
    weight: "Tensor | None",
    bias: "Tensor | None",
    seed: "Tensor | None",
    dropout_p: float,
    eps: float,
    is_rms_norm: bool,
    prenorm: bool,
    z_dtype: torch.dtype,
) -> "tuple[Tensor, Tensor | None, Tensor | None, Tensor]":
    """As reference.dropout_add_layer_norm_fwd."""
    return entry("dropout_add_layer_norm_fwd")(
        x, residual, weight, bias, seed, *dropout_options(dropout_p), eps, is_rms_norm, prenorm,
        z_dtype,
    )  # fmt: skip


def dropout_add_layer_norm_bwd(
    grad_y: Tensor,
    grad_z: "Tensor | None",
    source: Tensor,
    residual: "Tensor | None",
    weight: "Tensor | None",
    bias: "Tensor | None",
    seed: "Tensor | None",
    mean: "Tensor | None",
    rstd: Tensor,
    dropout_p: float,
    is_rms_norm: bool,
    prenorm: bool,
    z_dtype: torch.dtype,
    residual_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> "tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]":
    """As reference.dropout_add_layer_norm_bwd."""
    return entry("dropout_add_layer_norm_bwd")(
        grad_y, grad_z, source, residual, weight, bias, seed, mean, rstd,
        *dropout_options(dropout_p), prenorm, z_dtype, residual_grad, weight_grad, bias_grad,
    )  # fmt: skip


# --- Bias + activation + dropout ------------------------------------------------------------------

# As csrc/cpu/elementwise.h numbers them.
_ACTIVATIONS = {"gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4}


def bias_activation_unsupported(x: Tensor, bias: "Tensor | None", *args: object) -> "str | None":
    """Why the kernels cannot take a call, or None."""
    return unsupported_tensors(x, bias)


def bias_activation_fwd(
    x: Tensor, bias: "Tensor | None", seed: "Tensor | None", activation: str, dropout_p: float
) -> Tensor:
    """As reference.bias_activation_fwd."""
    return entry("bias_activation_fwd")(
        x, bias, seed, _ACTIVATIONS[activation], *dropout_options(dropout_p)
    )


def bias_activation_bwd(
    grad_out: Tensor,
    x: Tensor,
    bias: "Tensor | None",
    seed: "Tensor | None",
    activation: str,
    dropout_p: float,
    bias_grad: bool,
) -> "tuple[Tensor, Tensor | None]":
    """As reference.bias_activation_bwd."""
    return entry("bias_activation_bwd")(
        grad_out, x, bias, seed, _ACTIVATIONS[activation], *dropout_options(dropout_p), bias_grad
    )


# --- Cross-entropy --------------------------------------------------------------------------------


def cross_entropy_unsupported(
    logits: Tensor, target: Tensor, weight: "Tensor | None", *args: object
) -> "str | None":
    """Why the kernels cannot take a call, or None."""
    return unsupported_tensors(logits, weight)


def cross_entropy_fwd(
    logits: Tensor, target: Tensor, weight: "Tensor | None", ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.cross_entropy_fwd."""
    return entry("cross_entropy_fwd")(logits, target, weight, ignore_index, smoothing)


def cross_entropy_bwd(
    grad_losses: Tensor,
    lse: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: "Tensor | None",
    ignore_index: int,
    smoothing: float,
    overwrite: bool = False,
) -> Tensor:
    """As reference.cross_entropy_bwd."""
    grad = logits if overwrite else logits.new_empty(logits.shape)
    entry("cross_entropy_bwd")(
        grad_losses, lse, logits, target, weight, ignore_index, smoothing, grad
    )
    return grad


# --- Linear layers of few rows --------------------------------------------------------------------


def linear_unsupported() -> "str | None":
    """Why torch's own product is to be preferred, or None."""
    reason = library()[1]
    if reason is None and torch.ops.fusedformer_native.isa() == "portable":
        return "portable code is not faster than torch's"
    return reason


def linear(x: Tensor, weight: Tensor, bias: "Tensor | None") -> Tensor:
    """x W^T + b, of x (..., K), W (N, K) and b (N,), all of one dtype; neither K nor rows are 0."""
    return torch.ops.fusedformer_native.linear.default(x, weight, bias)


# --- Attention ------------------------------------------------------------------------------------


def attention_unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: "Tensor | None",
    key_lengths: "Tensor | None",
    seed: "Tensor | None",
    diagonal: "int | None",
    scale: float,
    dropout_p: float,
    offsets: list[int],
) -> "str | None":
    """Why these kernels cannot take a call, or None."""
    return unsupported_tensors(query)


def attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: "Tensor | None",
    key_lengths: "Tensor | None",
    seed: "Tensor | None",
    diagonal: "int | None",
    scale: float,
    dropout_p: float,
    offsets: list[int],
) -> tuple[Tensor, Tensor]:
    """O and LSE; see reference.attention_fwd."""
    if diagonal is None:
        diagonal = key.shape[2]  # which hides nothing
    dropout = () if seed is None else (seed, *dropout_options(dropout_p), *offsets)
    return entry("attention_fwd")(
        query, key, value, mask, key_lengths, diagonal, scale, *dropout
    )


def attention_bwd(
    grad_out: Tensor,
    grad_lse: "Tensor | None",
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: "Tensor | None",
    key_lengths: "Tensor | None",
    seed: "Tensor | None",
    diagonal: "int | None",
    scale: float,
    dropout_p: float,
    offsets: list[int],
    mask_grad: bool,
) -> "tuple[Tensor, Tensor, Tensor, Tensor | None]":
    """dQ, dK, dV and the mask's gradient, None where not asked; see reference.attention_bwd.

    Deterministic.
    """
    if diagonal is None:
        diagonal = key.shape[2]
    dropout = () if seed is None else (seed, *dropout_options(dropout_p), *offsets)
    return entry("attention_bwd")(
        grad_out, grad_lse, out, lse, mask_grad,
        query, key, value, mask, key_lengths, diagonal, scale, *dropout,
    )  # fmt: skip
