"""Tensors as the row-wise kernels read them: matrices with neighbouring columns."""

from torch import Tensor


def as_rows(tensor: Tensor) -> Tensor:
    """(..., N) as (rows, N) whose last stride is 1; a copy only where strides allow no view."""
    rows = tensor.reshape(tensor.numel() // tensor.shape[-1], tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def access(*rows: Tensor) -> int:
    """Elements of a 16-byte access (of the widest dtype)."""
    return 16 // max(tensor.element_size() for tensor in rows)


def aligned(*rows: Tensor) -> bool:
    """Whether every row starts and ends on a boundary of such accesses, if the first one does."""
    unit = access(*rows)
    return all(t.stride(0) % unit == 0 and t.shape[1] % unit == 0 for t in rows)
