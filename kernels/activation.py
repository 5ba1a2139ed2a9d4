"""Bias, activation and dropout in one pass: dropout(act(x + bias)).

GELU is Hendrycks & Gimpel, "Gaussian Error Linear Units" (2016); SiLU is Elfwing et al.,
"Sigmoid-Weighted Linear Units" (2017).
"""

import torch
from torch import Tensor

from fusedformer.kernels import dispatch, rng
from fusedformer.kernels.checks import (
    check_dropout_p,
    check_floating,
    check_tensor,
    shape,
)
from fusedformer.kernels.function import Function, once_differentiable, run

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


# --- Registered ops -------------------------------------------------------------------------------

_ARGS = "Tensor x, Tensor? bias, Tensor? seed, str activation, float dropout_p"


def _fwd(x, bias, seed, activation, dropout_p, backend):
    if x.numel() == 0 or dropout_p == 1:
        return x.new_zeros(x.shape)
    args = (x, bias, seed, activation, dropout_p)
    return dispatch.pick("bias_activation", backend, args).bias_activation_fwd(*args)


def _fwd_fake(x, *args):
    return x.new_empty(x.shape)


def _bwd(grad_out, x, bias, seed, activation, dropout_p, bias_grad, backend):
    if x.numel() == 0 or dropout_p == 1:
        return x.new_zeros(x.shape), bias.new_zeros(bias.shape) if bias_grad else x.new_empty(0)
    args = (x, bias, seed, activation, dropout_p)
    module = dispatch.pick("bias_activation", backend, args)
    grad_x, grad_bias = module.bias_activation_bwd(grad_out, *args, bias_grad)
    return grad_x, x.new_empty(0) if grad_bias is None else grad_bias


def _bwd_fake(grad_out, x, bias, seed, activation, dropout_p, bias_grad, backend):
    return x.new_empty(x.shape), bias.new_empty(bias.shape) if bias_grad else x.new_empty(0)


_call_fwd = dispatch.define(
    "bias_activation",
    "activation",
    f"bias_activation_fwd({_ARGS}, str backend) -> Tensor",
    _fwd,
    _fwd_fake,
)
_call_bwd = dispatch.define(
    "bias_activation",
    "activation",
    f"bias_activation_bwd(Tensor grad_out, {_ARGS}, bool bias_grad, str backend) "
    "-> (Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


class _BiasActivation(Function):
    differentiable = 2

    @staticmethod
    def forward(x, bias, seed, activation, dropout_p, backend):
        return _call_fwd(x, bias, seed, activation, dropout_p, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, activation, dropout_p, backend = inputs
        ctx.options = activation, dropout_p
        ctx.backend = backend
        ctx.save_for_backward(*tensors)  # x, bias, seed: all else is recomputed
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        if grad_out is None:
            return (None,) * 6
        bias_grad = ctx.needs_input_grad[1]
        grad_x, grad_bias = _call_bwd(
            grad_out, *ctx.saved_tensors, *ctx.options, bias_grad, ctx.backend
        )
        return grad_x, grad_bias if bias_grad else None, None, None, None, None


# --- Public function ------------------------------------------------------------------------------


def bias_activation(
    x: Tensor,
    bias: "Tensor | None" = None,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    *,
    seed: "int | Tensor | None" = None,
    backend: "str | None" = None,
) -> Tensor:
    """dropout(act(x + bias)), one pass over x; the backward recomputes it all from x and bias.

    Computed in float32 and rounded once; dtypes are kept under autocast.

    Args:
        x: (..., N), float32, float16 or bfloat16 (float64 on the reference backend only); any
            strides.
        bias: (N,), any of these dtypes (float32 with a bfloat16 x, say); its gradient is summed in
            float32, in a fixed order.
        activation: "gelu" (exact: z Phi(z)), "gelu_tanh" (its tanh approximation), "relu", "silu".
        dropout_p: probability in [0, 1] that an element is dropped; those kept are scaled by
            1 / (1 - p). Always applied: pass 0 at inference.
        seed: of the dropout mask, an int or a 0-d int64 tensor; drawn from torch's generator when
            None. An element's fate depends on the seed, its column and its row (all dimensions but
            the last flattened) alone. The shards of a DTensor each draw a mask of their own, not
            their part of the whole's.
        backend: "reference", "triton", "cpu"; None chooses. One that is named runs or raises.

    Returns:
        A contiguous tensor of x's shape and dtype.

    Raises:
        ValueError, TypeError: an argument is not as above.
        RuntimeError: the backend named cannot run this call; the message says why.
    """
    name = "bias_activation"
    check_floating(name, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{name}: x must have at least one dimension; got a 0-d tensor")
    if bias is not None:
        check_floating(name, "bias", bias)
        check_tensor(name, "bias", bias, like=x, like_label="x", same_dtype=False)
        if tuple(bias.shape) != (x.shape[-1],):
            raise ValueError(
                f"{name}: bias must be ({x.shape[-1]},), as the last dimension of x; "
                f"got {shape(bias)}"
            )
        if bias.dtype == torch.float64 and x.dtype != torch.float64:
            raise TypeError(f"{name}: a float64 bias needs a float64 x; got {x.dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{name}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}"
        )
    check_dropout_p(name, dropout_p)
    seed = rng.as_seed(name, seed, x.device) if dropout_p > 0 else None
    backend = dispatch.checked(name, backend)
    return run(_BiasActivation, x, bias, seed, activation, float(dropout_p), backend)
