"""Dropout + add + layer norm: z = residual + dropout(x), y = layer_norm(z), in one pass.

Ba, Kiros & Hinton, "Layer Normalization" (2016); Zhang & Sennrich, "Root Mean Square Layer
Normalization" (2019).
"""

import torch
from torch import Tensor

from fusedformer.kernels import dispatch, rng
from fusedformer.kernels.checks import (
    alike,
    check_dropout_p,
    check_floating,
    check_strided,
    check_tensor,
    is_number,
    shape,
)
from fusedformer.kernels.function import Function, once_differentiable, run
from fusedformer.kernels.norm_plain import norm_plain

OP = "dropout_add_layer_norm"

# --- Registered ops -------------------------------------------------------------------------------
#
# The contract that lets the forward of one backend pair with the backward of any other:
#
# - z is computed in float32 and rounded to z_dtype (residual's dtype; without one x's, or float32)
#   before it is normed, whether it is returned or not. With prenorm it is returned, and the
#   backward takes it as ``source``; else ``source`` is x, and the backward makes z, mask and all,
#   once more. So no option costs a tensor that the caller did not ask for.
# - mean and rstd = 1 / sqrt(variance + eps): x.shape[:-1], float32 (float64 for float64); RMS norm
#   has no mean.
# - A backend returns None for what was not asked for; the registered op an empty tensor.


def _stats_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _nothing(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty(0, dtype=dtype)


def _fwd_fake(
    x, residual, weight, bias, seed, dropout_p, eps, is_rms_norm, prenorm, z_dtype, backend
):  # fmt: skip
    stats = _stats_dtype(x)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=z_dtype) if prenorm else _nothing(x, z_dtype),
        _nothing(x, stats) if is_rms_norm else x.new_empty(x.shape[:-1], dtype=stats),
        x.new_empty(x.shape[:-1], dtype=stats),
    )


def _fwd(x, residual, weight, bias, seed, dropout_p, eps, is_rms_norm, prenorm, z_dtype, backend):
    if x.numel() == 0:  # no rows
        return _fwd_fake(
            x, residual, weight, bias, seed, dropout_p, eps, is_rms_norm, prenorm, z_dtype, backend
        )
    if dropout_p == 1:  # nothing is left of x
        x, seed, dropout_p = x.new_zeros(()).expand(x.shape), None, 0.0
    args = (x, residual, weight, bias, seed, dropout_p, eps, is_rms_norm, prenorm, z_dtype)
    y, z, mean, rstd = dispatch.pick(OP, backend, args).dropout_add_layer_norm_fwd(*args)
    return (
        y,
        _nothing(x, z_dtype) if z is None else z,
        _nothing(x, rstd.dtype) if mean is None else mean,
        rstd,
    )


def _bwd_fake(
    grad_y, grad_z, source, residual, weight, bias, seed, mean, rstd, dropout_p, is_rms_norm,
    prenorm, z_dtype, residual_grad, weight_grad, bias_grad, backend,
):  # fmt: skip
    return (
        grad_y.new_empty(grad_y.shape),
        grad_y.new_empty(grad_y.shape if residual_grad else (0,), dtype=z_dtype),
        weight.new_empty(weight.shape) if weight_grad else _nothing(grad_y, grad_y.dtype),
        bias.new_empty(bias.shape) if bias_grad else _nothing(grad_y, grad_y.dtype),
    )


def _bwd(
    grad_y, grad_z, source, residual, weight, bias, seed, mean, rstd, dropout_p, is_rms_norm,
    prenorm, z_dtype, residual_grad, weight_grad, bias_grad, backend,
):  # fmt: skip
    if grad_y.numel() == 0:
        grads = _bwd_fake(
            grad_y, grad_z, source, residual, weight, bias, seed, mean, rstd, dropout_p,
            is_rms_norm, prenorm, z_dtype, residual_grad, weight_grad, bias_grad, backend,
        )  # fmt: skip
        return tuple(grad.zero_() for grad in grads)
    all_dropped = dropout_p == 1
    if all_dropped:
        seed, dropout_p = None, 0.0
        source = source if prenorm else source.new_zeros(()).expand(source.shape)
    mean = None if is_rms_norm else mean
    module = dispatch.pick(OP, backend, (grad_y, residual, weight, bias, seed))
    grad_x, grad_residual, grad_weight, grad_bias = module.dropout_add_layer_norm_bwd(
        grad_y, grad_z, source, residual, weight, bias, seed, mean, rstd, dropout_p, is_rms_norm,
        prenorm, z_dtype, residual_grad, weight_grad, bias_grad,
    )  # fmt: skip
    return (
        grad_x.new_zeros(grad_x.shape) if all_dropped else grad_x,
        _nothing(grad_y, z_dtype) if grad_residual is None else grad_residual,
        _nothing(grad_y, grad_y.dtype) if grad_weight is None else grad_weight,
        _nothing(grad_y, grad_y.dtype) if grad_bias is None else grad_bias,
    )


_call_fwd = dispatch.define(
    OP,
    "layer_norm",
    "dropout_add_layer_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor? seed, float dropout_p, float eps, bool is_rms_norm, bool prenorm, "
    "ScalarType z_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
_call_bwd = dispatch.define(
    OP,
    "layer_norm",
    "dropout_add_layer_norm_bwd(Tensor grad_y, Tensor? grad_z, Tensor source, Tensor? residual, "
    "Tensor? weight, Tensor? bias, Tensor? seed, Tensor mean, Tensor rstd, float dropout_p, "
    "bool is_rms_norm, bool prenorm, ScalarType z_dtype, bool residual_grad, bool weight_grad, "
    "bool bias_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


class _DropoutAddLayerNorm(Function):
    differentiable = 4

    # Named one by one: where nothing needs a gradient, Dynamo cannot trace a forward(*args).
    @staticmethod
    def forward(
        x, residual, weight, bias, seed, dropout_p, eps, is_rms_norm, prenorm, z_dtype, backend
    ):  # fmt: skip
        return _call_fwd(
            x, residual, weight, bias, seed, dropout_p, eps, is_rms_norm, prenorm, z_dtype, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, weight, bias, seed, dropout_p, _, is_rms_norm, prenorm, z_dtype, backend = (
            inputs
        )
        _, z, mean, rstd = output
        source, kept = (z, None) if prenorm else (x, residual)
        ctx.save_for_backward(source, kept, weight, bias, seed, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd, *(() if prenorm else (z,)))
        ctx.set_materialize_grads(False)
        ctx.options = (dropout_p, is_rms_norm, prenorm, z_dtype)
        ctx.backend = backend
        ctx.x_dtype = x.dtype
        # Where nothing is dropped or rounded, both have one gradient, computed once.
        ctx.same_grad = seed is None and x.dtype == z_dtype
        ctx.has_residual = residual is not None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_z, *_):
        if not ctx.options[2]:  # prenorm: under torch.compile an unused z has a gradient, too
            grad_z = None
        if grad_y is None and grad_z is None:
            return (None,) * 11
        saved = ctx.saved_tensors  # once: checkpointing allows no more
        source = saved[0]
        if grad_y is None:
            grad_y = source.new_zeros((), dtype=ctx.x_dtype).expand(source.shape)
        wanted = [
            ctx.has_residual and ctx.needs_input_grad[1] and not ctx.same_grad,
            ctx.needs_input_grad[2],
            ctx.needs_input_grad[3],
        ]
        grads = _call_bwd(
            grad_y, grad_z, *saved, *ctx.options, *wanted, ctx.backend
        )
        found = [grad if want else None for grad, want in zip(grads[1:], wanted, strict=True)]
        if ctx.has_residual and ctx.same_grad:
            found[0] = grads[0]
        return (grads[0], *found, *(None,) * 7)


# --- Public functions -----------------------------------------------------------------------------


def _check(name: str, x: Tensor, eps: float, **others: "Tensor | None") -> None:
    check_floating(name, "x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: x must have a last dimension of 1 or more; got {shape(x)}")
    for label, tensor in others.items():
        if tensor is None:
            continue
        if not alike(x, tensor):
            check_floating(name, label, tensor)
            check_tensor(name, label, tensor, like=x, like_label="x", same_dtype=False)
            if torch.float64 in (x.dtype, tensor.dtype) and x.dtype != tensor.dtype:
                raise TypeError(
                    f"{name}: float64 goes with float64 only; x is {x.dtype}, "
                    f"{label} {tensor.dtype}"
                )
        wanted = x.shape if label == "residual" else x.shape[-1:]
        if tensor.shape != wanted:
            raise ValueError(
                f"{name}: {label} must be {tuple(wanted)}, as x is {shape(x)}; got {shape(tensor)}"
            )
    if not is_number(eps):
        raise TypeError(f"{name}: eps must be a number, 0 or more; got {eps!r}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{name}: eps must be a number, 0 or more; got {eps}")


def dropout_add_layer_norm(
    x: Tensor,
    residual: "Tensor | None" = None,
    weight: "Tensor | None" = None,
    bias: "Tensor | None" = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    *,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    seed: "int | Tensor | None" = None,
    backend: "str | None" = None,
) -> "Tensor | tuple[Tensor, Tensor]":
    """z = residual + dropout(x); y = layer_norm(z) * weight + bias, over the last dimension.

    Computed in float32. z is rounded to its dtype before it is normed, so that y is the norm of
    the z returned, and the same whether z is returned or not. Saved for the backward: the seed,
    two numbers a row (RMS norm: one), and z with prenorm, else x and residual.

    Args:
        x: (..., N), float32, float16 or bfloat16 (float64 on the reference backend only); any N,
            any strides.
        residual: of x's shape; of any of these dtypes (a float32 residual stream under bfloat16
            activations). float64 goes with float64 only, here and below.
        weight, bias: (N,), either or both; of any of these dtypes.
        dropout_p: probability, in [0, 1], that an element of x is dropped; those kept are scaled
            by 1 / (1 - p). Always applied: pass 0 at inference.
        eps: added to the variance.
        prenorm: also return z, the new residual stream. A gradient that reaches it is added in.
        residual_in_fp32: z is float32 where residual is None; else z has residual's dtype.
        is_rms_norm: y = z / sqrt(mean(z^2) + eps) * weight + bias, without subtracting the mean.
        seed: of the dropout mask, an int or a 0-d int64 tensor; drawn from torch's generator when
            None. The shards of a DTensor each draw a mask of their own, not their part of the
            whole's.
        backend: "reference", "triton", "cpu"; None chooses. One that is named runs or raises.

    Returns:
        y of x's shape and dtype, under autocast too; with prenorm (y, z), z in residual's dtype, or
        without one in x's (but see residual_in_fp32). Both contiguous.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is not as above.
        RuntimeError: the backend named cannot run this call; the message says why.
    """
    if backend is None and seed is None and not prenorm and not residual_in_fp32:
        y, seed = norm_plain(x, residual, weight, bias, dropout_p, eps, is_rms_norm)
        if y is not None:
            return y
    _check(OP, x, eps, residual=residual, weight=weight, bias=bias)
    check_dropout_p(OP, dropout_p)
    seed = rng.as_seed(OP, seed, x.device) if dropout_p > 0 else None
    z_dtype = x.dtype if residual is None else residual.dtype
    if residual is None and residual_in_fp32:
        z_dtype = _stats_dtype(x)
    y, z, _, _ = run(
        _DropoutAddLayerNorm,
        x, residual, weight, bias, seed, float(dropout_p), float(eps), is_rms_norm, prenorm,
        z_dtype, dispatch.checked(OP, backend),
    )  # fmt: skip
    return (y, z) if prenorm else y


def _norm(name, x, weight, bias, eps, is_rms_norm, backend):
    if backend is None:
        y, _ = norm_plain(x, None, weight, bias, 0.0, eps, is_rms_norm)
        if y is not None:
            return y
    _check(name, x, eps, weight=weight, bias=bias)
    try:
        return run(
            _DropoutAddLayerNorm,
            x, None, weight, bias, None, 0.0, float(eps), is_rms_norm, False, x.dtype,
            dispatch.checked(name, backend),
        )[0]  # fmt: skip
    except TypeError:  # the op says what is not dense, but under its own name
        for label, tensor in (("x", x), ("weight", weight), ("bias", bias)):
            if tensor is not None:
                check_strided(name, label, tensor)
        raise


def layer_norm(
    x: Tensor,
    weight: "Tensor | None" = None,
    bias: "Tensor | None" = None,
    eps: float = 1e-5,
    *,
    backend: "str | None" = None,
) -> Tensor:
    """Layer norm over the last dimension: (x - mean) / sqrt(variance + eps) * weight + bias.

    Args, dtypes and errors as dropout_add_layer_norm(); the variance is the biased one.

    Returns:
        A contiguous tensor of x's shape and dtype, under autocast too.
    """
    return _norm("layer_norm", x, weight, bias, eps, False, backend)


def rms_norm(
    x: Tensor,
    weight: "Tensor | None" = None,
    eps: float = 1e-6,
    *,
    backend: "str | None" = None,
) -> Tensor:
    """RMS norm over the last dimension: x / sqrt(mean(x^2) + eps) * weight.

    Args, dtypes and errors as dropout_add_layer_norm().

    Returns:
        A contiguous tensor of x's shape and dtype, under autocast too.
    """
    return _norm("rms_norm", x, weight, None, eps, True, backend)
