"""Cross-entropy on Triton: which tiles, and the launches.

Up to NARROW classes a tile holds several whole rows. Wider rows are read in blocks.

A row of 50257 16-bit logits starts anywhere, so that its accesses could not be of 16 bytes. The
wide kernels therefore read from the last 16-byte boundary at or before a row's start; only the
first and the last block then need a mask, and the others are read in whole accesses.
"""

import functools

import torch
from torch import Tensor

from fusedformer.kernels.triton.cross_entropy_backward import (
    cross_entropy_narrow_bwd_kernel,
    cross_entropy_wide_bwd_kernel,
)
from fusedformer.kernels.triton.cross_entropy_forward import (
    cross_entropy_narrow_fwd_kernel,
    cross_entropy_wide_fwd_kernel,
)
from fusedformer.kernels.triton.launch import (
    cdiv,
    launch,
    power_of_2,
    unsupported_device,
    unsupported_rows,
)
from fusedformer.kernels.triton.rows import as_rows, unit

__all__ = [
    "cross_entropy_bwd",
    "cross_entropy_fwd",
    "cross_entropy_unsupported",
    "unsupported_device",
]

# Classes up to which whole rows are held: 4096 elements are 32 a thread of 4 warps.
NARROW = 4096


def cross_entropy_unsupported(
    logits: Tensor, target: Tensor, weight: "Tensor | None", *args: object
) -> "str | None":
    """Why the kernels cannot take a call, or None."""
    return unsupported_rows(logits, weight)


def _weights(
    weight: "Tensor | None", smoothing: float, unused: Tensor
) -> tuple[Tensor, Tensor, dict[str, bool]]:
    """The class weights, their sum, and the flags that say whether kernels read them."""
    flags = {"HAS_WEIGHT": weight is not None, "SMOOTHING": smoothing > 0}
    if weight is None:
        return unused, unused, flags
    total = weight.sum(dtype=torch.float32) if smoothing > 0 else unused
    return weight.contiguous(), total, flags


@functools.cache
def _narrow_tile(classes: int) -> dict[str, int]:
    """Whole rows, 16 elements a thread of 4 warps; no fewer columns than a 16-byte access has.

    16 rows at most: threads hold a few numbers for each of their rows, and would spill.
    """
    columns = max(8, power_of_2(classes))
    return {"ROWS": max(1, min(2048 // columns, 16)), "COLUMNS": columns, "num_warps": 4}


@functools.cache
def _wide_block(classes: int, weighted: bool) -> dict[str, int]:
    """A block of a wide row, in the forward; shorter ones leave less of a short row masked."""
    if weighted:
        # Each weight is read beside its logit: 16 of both a thread, as more would spill.
        return {"COLUMNS": 2048, "num_warps": 4}
    # 32 elements a thread are in flight.
    short = classes < 16384
    return {"COLUMNS": 4096 if short else 8192, "num_warps": 4 if short else 8}


@functools.cache
def _wide_grad_block(classes: int) -> dict[str, int]:
    """A block of a wide row, in the backward: 32 elements a thread, and where it is read element by
    element, 4."""
    return {"COLUMNS": 4096, "PIECE": 512, "num_warps": 4}


def cross_entropy_fwd(
    logits: Tensor, target: Tensor, weight: "Tensor | None", ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, rows' weights and LSE, as reference.cross_entropy_fwd."""
    classes = logits.shape[-1]
    n_rows = logits.numel() // classes
    rows, stride = as_rows(logits, classes)
    target = target.contiguous()
    losses, row_weights, lse = (torch.empty_like(target, dtype=torch.float32) for _ in range(3))
    weight, weight_sum, flags = _weights(weight, smoothing, rows)
    tensors = (rows, target, weight, weight_sum, losses, row_weights, lse)
    numbers = (classes, ignore_index, 1 - smoothing, smoothing / classes)
    if classes <= NARROW:
        tile = _narrow_tile(classes)
        launch(
            cross_entropy_narrow_fwd_kernel,
            (cdiv(n_rows, tile["ROWS"]),),
            *tensors,
            stride,
            n_rows,
            *numbers,
            **flags,
            UNIT=unit(classes, stride),
            **tile,
        )
    else:
        access = 16 // logits.element_size()
        launch(
            cross_entropy_wide_fwd_kernel,
            (n_rows,),
            *tensors,
            stride,
            *numbers,
            **flags,
            ALIGNED=unit(classes, stride) >= access,
            UNIT=access,
            **_wide_block(classes, flags["HAS_WEIGHT"] and flags["SMOOTHING"]),
        )
    return losses, row_weights, lse


def cross_entropy_bwd(
    grad_losses: Tensor,
    lse: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: "Tensor | None",
    ignore_index: int,
    smoothing: float,
    overwrite: bool = False,
) -> Tensor:
    """The gradient of the logits, as reference.cross_entropy_bwd."""
    classes = logits.shape[-1]
    n_rows = logits.numel() // classes
    rows, stride = as_rows(logits, classes)
    grad = logits
    if not overwrite:
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    grad_rows, grad_stride = as_rows(grad, classes)
    grad_losses = grad_losses.reshape(n_rows)
    weight, weight_sum, flags = _weights(weight, smoothing, rows)
    lse, target = lse.contiguous(), target.contiguous()
    tensors = (rows, grad_rows, grad_losses, lse, target, weight, weight_sum)
    strides = (stride, grad_stride, grad_losses.stride(0))
    numbers = (classes, ignore_index, 1 - smoothing, smoothing / classes)
    multiple = unit(classes, stride, grad_stride)
    if classes <= NARROW:
        tile = _narrow_tile(classes)
        launch(
            cross_entropy_narrow_bwd_kernel,
            (cdiv(n_rows, tile["ROWS"]),),
            *tensors,
            *strides,
            n_rows,
            *numbers,
            **flags,
            UNIT=multiple,
            **tile,
        )
    else:
        block = _wide_grad_block(classes)
        access = 16 // logits.element_size()
        whole = multiple >= access
        # A row that does not start on a boundary has up to UNIT - 1 more elements before it.
        blocks = cdiv(classes + (0 if whole else access - 1), block["COLUMNS"])
        launch(
            cross_entropy_wide_bwd_kernel,
            (n_rows * blocks,),
            *tensors,
            *strides,
            blocks,
            *numbers,
            **flags,
            ALIGNED=whole,
            SAME_STRIDE=stride == grad_stride,
            UNIT=access,
            **block,
        )
    return grad
