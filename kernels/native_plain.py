"""The C++ kernels of calls without options, whose arguments nobody has checked.

What is not as usual, these functions hand back: None. Arguments that are not passed to C++ cost no
time there. For attention_plain.py and norm_plain.py.
"""

from typing import Any

from torch import Tensor

from fusedformer.kernels.native_library import dropout_options, entry, library

# --- Norms ----------------------------------------------------------------------------------------


def _norm_call(
    name: str,
    x: Tensor,
    weight: "Tensor | None",
    bias: "Tensor | None",
    eps: float,
    is_rms_norm: bool,
    residual: "Tensor | None",
    seed: "Tensor | None",
    dropout_p: float,
) -> Any:
    options: tuple = (eps, is_rms_norm) if is_rms_norm or eps != 1e-5 else ()
    if seed is not None:
        options = (eps, is_rms_norm, residual, seed, *dropout_options(dropout_p))
    elif residual is not None:
        options = (eps, is_rms_norm, residual)
    return entry(name)(x, weight, bias, *options)


def norm_plain(x: Tensor, *args: Any) -> "Tensor | None":
    """y of (x, weight, bias, eps, is_rms_norm, residual, seed, dropout_p), or None."""
    if library()[1] is not None:
        return None
    try:
        return _norm_call("norm_plain", x, *args)
    except NotImplementedError:  # sparse, nested, on another device
        return None


def norm_plain_fwd(x: Tensor, *args: Any) -> "tuple[Tensor, Tensor] | tuple[None, None]":
    """y and the statistics, (2, rows): rstd and mean, or for RMS norm rstd alone; or None twice."""
    if library()[1] is not None:
        return None, None
    try:
        return _norm_call("norm_plain_fwd", x, *args)
    except NotImplementedError:
        return None, None


def norm_plain_bwd(
    grad_y: Tensor,
    stats: Tensor,
    residual_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    x: Tensor,
    weight: "Tensor | None",
    bias: "Tensor | None",
    residual: "Tensor | None",
    seed: "Tensor | None",
    dropout_p: float,
) -> "tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]":
    """The gradients, None where not wanted, of a call that norm_plain_fwd took."""
    options = () if seed is None else dropout_options(dropout_p)
    return entry("norm_plain_bwd")(
        grad_y, stats, residual_grad, weight_grad, bias_grad, x, weight, bias, residual, seed,
        *options,
    )  # fmt: skip


# --- Attention ------------------------------------------------------------------------------------


def _plain_options(causal: bool, scale: "float | None") -> tuple:
    return () if scale is None and not causal else (bool(causal), scale)


def attention_plain(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: "float | None"
) -> "Tensor | None":
    """O, or None."""
    if library()[1] is not None:
        return None
    try:
        return entry("attention_plain")(query, key, value, *_plain_options(causal, scale))
    except NotImplementedError:  # sparse, nested, on another device
        return None


def attention_plain_fwd(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: "float | None"
) -> "tuple[Tensor, Tensor] | tuple[None, None]":
    """O and LSE, or None and None."""
    if library()[1] is not None:
        return None, None
    try:
        return entry("attention_plain_fwd")(query, key, value, *_plain_options(causal, scale))
    except NotImplementedError:
        return None, None


def attention_plain_bwd(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    scale: "float | None",
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of a call that attention_plain_fwd took."""
    return entry("attention_plain_bwd")(
        grad_out, out, lse, query, key, value, *_plain_options(causal, scale)
    )
