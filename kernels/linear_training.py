"""Linear layers in float32 on a CPU, in training, by the faster of torch's two libraries.

torch's float32 products are MKL's, which leaves AVX-512 to Intel's processors; on others the
products of oneDNN, which torch holds as well, are faster (docs/notes.md). No op of its own: it is
taken where nothing but the numbers can be seen.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedformer.kernels import dispatch
from fusedformer.kernels.linear import is_dense, is_layer

# Measured on two cores of an AMD EPYC with AVX-512, the three products of a layer: with 64 rows and
# 256 x 256 weights 1.1 times the speed of MKL's, with 512 x 512 1.7, from 512 rows on 2.1 times.
_LEAST_WEIGHTS = 2**16
_LEAST_ROWS = 64
# oneDNN adds up all terms in one sum, MKL in several: of more than this, its error can be more than
# twice MKL's (docs/notes.md), and MKL's product is taken.
_MOST_TERMS = 1024


def linear_in_training(x: Tensor, weight: Tensor, bias: "Tensor | None") -> "Tensor | None":
    """x W^T + b, (..., N), contiguous, with its gradients; None where torch is to compute it.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).
    """
    if (
        not torch.is_grad_enabled()
        or not dispatch.alone_on_cpu((x, weight) if bias is None else (x, weight, bias))
        or not (_fit(x, weight, bias) and _pays() and torch.backends.mkldnn.enabled)
    ):
        return None
    return _Linear.apply(x, weight, bias)


def _fit(x: Tensor, weight: Tensor, bias: "Tensor | None") -> bool:
    return (
        is_layer(x, weight, bias)
        and x.dtype == torch.float32
        and weight.numel() >= _LEAST_WEIGHTS
        and x.numel() >= _LEAST_ROWS * weight.shape[1]
        and (x.requires_grad or weight.requires_grad)
    )


@functools.cache
def _pays() -> bool:
    """Whether MKL has less of this processor than oneDNN."""
    backends = torch.backends
    if not (
        backends.cpu.get_cpu_capability() == "AVX512"
        and backends.mkl.is_available()
        and backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def faster(*matrices: Tensor) -> bool:
    """Whether product() is faster than torch's own: of many rows in float32, on such a CPU."""
    rows, terms = matrices[0].shape
    fit = rows >= _LEAST_ROWS and matrices[1].numel() >= _LEAST_WEIGHTS and terms <= _MOST_TERMS
    alike = all(is_dense(matrix) and matrix.dtype == torch.float32 for matrix in matrices)
    return fit and alike and _pays() and bool(torch.backends.mkldnn.enabled)


def product(a: Tensor, b: Tensor, bias: "Tensor | None" = None) -> Tensor:
    """a b^T + bias, of matrices, without derivatives."""
    if a.shape[1] > _MOST_TERMS:
        return torch.nn.functional.linear(a, b, bias)
    if not (b.is_contiguous() or b.t().is_contiguous()):
        # oneDNN refuses rows that overlap; where there is something between them, as in a chunk of
        # a wider matrix, it takes a thousand times as long.
        b = b.contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """torch.nn.functional.linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: "Tensor | None") -> Tensor:
        ctx.save_for_backward(x, weight)
        y = product(x.reshape(-1, x.shape[-1]), weight, bias)
        # A view of torch's would not let its user write into it.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> "tuple[Tensor | None, ...]":
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        # oneDNN's products have no derivatives, and nothing that looks on knows them.
        alone = dispatch.unobserved_backward((grad, None, x, weight))
        torchs = torch.is_grad_enabled() or not alone
        multiply = (lambda a, b: a @ b.t()) if torchs else product
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        return (
            multiply(grads, weight.t()).view(x.shape) if of_x else None,
            multiply(grads.t(), rows.t()) if of_weight else None,
            grads.sum(0) if of_bias else None,
        )
