"""Matrices of one shape in the layouts that callers bring."""

import torch
from torch import Tensor

LAYOUTS = [
    "contiguous",
    "transposed",
    "every other",
    "rows apart",
    "rows apart by 16",
    "shifted",
    "expanded",
    "two of rows",
]


def matrix(layout: str, rows: int, width: int, **kind) -> Tensor:
    """Normal numbers, (rows, width); (2, rows, width) for "two of rows"."""
    if layout == "transposed":
        return torch.randn(width, rows, **kind).T
    if layout == "every other":
        return torch.randn(rows, 2 * width, **kind)[:, ::2]
    if layout == "rows apart":
        return torch.randn(rows, width + 3, **kind)[:, :width]
    if layout == "rows apart by 16":
        return torch.randn(rows, width + 16, **kind)[:, :width]
    if layout == "shifted":
        return torch.randn(rows * width + 1, **kind)[1:].view(rows, width)
    if layout == "expanded":
        return torch.randn(1, width, **kind).expand(rows, width)
    if layout == "two of rows":
        # Two leading dimensions that no single stride covers.
        return torch.randn(rows, 2, width, **kind).transpose(0, 1)
    return torch.randn(rows, width, **kind)
