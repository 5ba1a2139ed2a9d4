"""Linear layers of a few rows on a CPU, as decoding has them: one token of each sequence.

No op of its own: fusedformer.nn.linear takes it where nothing but its numbers can be seen.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from fusedformer.kernels import dispatch

# Measured on two cores with AVX-512, and held to AVX2: up to so many rows the C++ kernel is faster
# than torch's product; with fewer weights, the call itself is most of it.
_MOST_ROWS = 16
_LEAST_WEIGHTS = 2**16
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def linear_of_few_rows(x: Tensor, weight: Tensor, bias: "Tensor | None") -> "Tensor | None":
    """x W^T + b, (..., N), contiguous; None where torch is to compute it, or to say what is wrong.

    The C++ kernel reads the weights as fast as memory gives them. A row's result depends neither on
    the others nor on the number of threads.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).
    """
    if (
        torch.is_grad_enabled()
        or not dispatch.alone_on_cpu((x, weight) if bias is None else (x, weight, bias))
        or not _fit(x, weight, bias)
    ):
        return None
    native = _native()
    return None if native is None else native.linear(x, weight, bias)


@functools.cache
def _native() -> "ModuleType | None":
    """The C++ backend, if this CPU has the instructions for which its kernel was measured."""
    native = importlib.import_module(dispatch.BACKENDS["cpu"])
    return None if native.linear_unsupported() else native


def _fit(x: Tensor, weight: Tensor, bias: "Tensor | None") -> bool:
    return (
        is_layer(x, weight, bias)
        and weight.numel() >= _LEAST_WEIGHTS
        and 0 < x.numel() <= _MOST_ROWS * weight.shape[1]
        and x.dtype in _DTYPES
    )


def is_layer(x: Tensor, weight: Tensor, bias: "Tensor | None") -> bool:
    """Whether the shapes are a linear layer's, of dense tensors of one dtype on the CPU."""
    if not (is_dense(x) and is_dense(weight) and weight.dim() == 2 and weight.is_contiguous()):
        return False
    columns, width = weight.shape
    return (
        x.dim() > 0
        and x.shape[-1] == width
        and x.dtype == weight.dtype
        and (
            bias is None
            or (is_dense(bias) and bias.dtype == x.dtype and tuple(bias.shape) == (columns,))
        )
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements lie in the CPU's memory, by strides."""
    return tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_nested
