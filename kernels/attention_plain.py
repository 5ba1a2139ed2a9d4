"""Attention without options by the shortest way: eager calls on a CPU that nothing looks on.

Of a small call, checks, dispatch and the registered op take longer than its arithmetic. Here one
C++ function checks the tensors and computes; where it finds them unusual or wrong, or something
else would see the call (dispatch.straight_to_cpu()), attention() goes its ordinary way, and
computes the same bits or says what is wrong.
"""

import torch
from torch import Tensor

from fusedformer.kernels import dispatch
from fusedformer.kernels.function import apply, once_differentiable, wants_gradient


class _Plain(torch.autograd.Function):
    """Never seen by transforms or compilers: hence forward() with ctx, and no vmap rule."""

    @staticmethod
    def forward(ctx, query, key, value, causal, scale, cpu):
        out, lse = cpu.attention_plain_fwd(query, key, value, causal, scale)
        if out is not None:
            ctx.save_for_backward(query, key, value, out, lse)
            ctx.options = causal, scale, cpu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value, out, lse = saved = ctx.saved_tensors
        causal, scale, cpu = ctx.options
        if dispatch.unobserved_backward((grad_out, None, *saved)):
            grads = cpu.attention_plain_bwd(grad_out, out, lse, query, key, value, causal, scale)
        else:
            diagonal = key.shape[2] - query.shape[2] if causal else None
            scale = query.shape[3] ** -0.5 if scale is None else scale
            grads = torch.ops.fusedformer.attention_bwd.default(
                grad_out, None, out, lse, query, key, value, None, None, None, diagonal, scale,
                0.0, [0, 0, 0, 0], False, dispatch.AUTOMATIC,
            )  # fmt: skip
        return (*grads[:3], None, None, None)


def attention_plain(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: object, dropout_p: object
) -> "Tensor | None":
    """O where the call can go straight to its kernel; else None, and nothing has been done."""
    if type(dropout_p) is not float or dropout_p != 0:
        return None
    if scale is not None and type(scale) is not float:
        return None
    cpu = dispatch.straight_to_cpu("attention", (query, key, value))
    if cpu is None:
        return None
    if wants_gradient(query, key, value):
        return apply(_Plain, query, key, value, causal, scale, cpu)
    return cpu.attention_plain(query, key, value, causal, scale)
