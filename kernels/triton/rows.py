"""Tensors as the row-wise kernels read them: matrices with neighbouring columns."""

import functools
import math

from torch import Tensor

from fusedformer.kernels import rng


def as_rows(tensor: Tensor, width: int) -> tuple[Tensor, int]:
    """(..., width) as rows whose last stride is 1, and the stride from row to row.

    The tensor itself, a view or, only where strides allow none, a copy; its shape means nothing.
    """
    if tensor.is_contiguous():
        return tensor, width
    rows = tensor.reshape(tensor.numel() // width, width)
    if rows.stride(1) != 1 and width > 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def unit(*sizes: int) -> int:
    """The greatest power of two, 16 at most, that divides a row's width and all strides.

    As a compile-time number it tells kernels which elements lie and end together: 8 of 16 bits, or
    4 of 32, are an access of 16 bytes.
    """
    return math.gcd(16, *sizes)


@functools.lru_cache
def dropout_arguments(p: float) -> tuple[int, float]:
    """What kernels take of p: the threshold of words, and the scale of what is kept."""
    return rng.threshold(p), 1 / (1 - p)
