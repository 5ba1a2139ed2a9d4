"""Layer and RMS norm, with dropout and residual or without, by the shortest way.

For eager calls on a CPU that nothing looks on, and that want no z; as attention_plain.py has it.
"""

import torch
from torch import Tensor

from fusedformer.kernels import dispatch, rng
from fusedformer.kernels.function import apply, once_differentiable, wants_gradient


class _Plain(torch.autograd.Function):
    """Never seen by transforms or compilers: hence forward() with ctx, and no vmap rule."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, seed, dropout_p, eps, is_rms_norm, cpu):
        y, stats = cpu.norm_plain_fwd(x, weight, bias, eps, is_rms_norm, residual, seed, dropout_p)
        if y is not None:
            ctx.save_for_backward(x, residual, weight, bias, seed, stats)
            ctx.options = dropout_p, is_rms_norm, cpu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, residual, weight, bias, seed, stats = saved = ctx.saved_tensors
        dropout_p, is_rms_norm, cpu = ctx.options
        _, residual_grad, weight_grad, bias_grad, *_ = ctx.needs_input_grad
        # Where nothing is dropped or rounded, both have one gradient, computed once.
        same_grad = residual_grad and seed is None and residual.dtype == x.dtype
        wanted = residual_grad and not same_grad, weight_grad, bias_grad
        if dispatch.unobserved_backward((grad_y, None, *saved)):
            grads = cpu.norm_plain_bwd(
                grad_y, stats, *wanted, x, weight, bias, residual, seed, dropout_p
            )
        else:
            rows = x.shape[:-1]
            z_dtype = x.dtype if residual is None else residual.dtype
            grads = torch.ops.fusedformer.dropout_add_layer_norm_bwd.default(
                grad_y, None, x, residual, weight, bias, seed,
                stats[1:].view(0 if is_rms_norm else rows), stats[0].view(rows),
                dropout_p, is_rms_norm, False, z_dtype, *wanted, dispatch.AUTOMATIC,
            )  # fmt: skip
        found = [grad if want else None for grad, want in zip(grads[1:], wanted, strict=True)]
        if same_grad:
            found[0] = grads[0]
        return (grads[0], *found, *(None,) * 5)


def norm_plain(
    x: Tensor,
    residual: "Tensor | None",
    weight: "Tensor | None",
    bias: "Tensor | None",
    dropout_p: object,
    eps: object,
    is_rms_norm: bool,
) -> "tuple[Tensor | None, Tensor | None]":
    """y, where the call can go straight to its kernel; else None, and the seed if one was drawn."""
    if type(eps) is not float or type(dropout_p) is not float or not 0 <= dropout_p < 1:
        return None, None
    tensors: tuple = (x, weight, bias) if residual is None else (x, weight, bias, residual)
    if weight is None or bias is None:
        tensors = tuple(tensor for tensor in tensors if tensor is not None)
    cpu = dispatch.straight_to_cpu("dropout_add_layer_norm", tensors)
    if cpu is None:
        return None, None
    seed = rng.draw_seed(x.device) if dropout_p > 0 else None
    if wants_gradient(*tensors):
        args = (x, residual, weight, bias, seed, dropout_p, eps, bool(is_rms_norm), cpu)
        return apply(_Plain, *args), seed
    return cpu.norm_plain(x, weight, bias, eps, is_rms_norm, residual, seed, dropout_p), seed
