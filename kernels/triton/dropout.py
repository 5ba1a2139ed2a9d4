"""Dropout on Triton: the kernel, then its launchers. The backward is the forward's own kernel."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedformer.kernels import rng
from fusedformer.kernels.triton.launch import (
    cdiv,
    launch,
    power_of_2,
    unsupported_device,
    unsupported_rows,
)
from fusedformer.kernels.triton.random import rows_keep
from fusedformer.kernels.triton.rows import as_rows, dropout_arguments, unit

__all__ = ["dropout_bwd", "dropout_fwd", "dropout_unsupported", "unsupported_device"]

TAG = tl.constexpr(rng.DROPOUT)


# --- Kernel ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["x_stride", "n_rows", "width", "threshold"])
def _dropout_kernel(
    x_ptr,  # (n_rows, width), rows x_stride apart
    out_ptr,  # (n_rows, width), contiguous
    seed_ptr,  # int64
    x_stride: tl.int64,
    n_rows: tl.int64,
    width: tl.int64,
    threshold: tl.uint32,
    scale,  # 1 / (1 - p)
    UNIT: tl.constexpr,  # width and x_stride are multiples of it
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    width = width // UNIT * UNIT
    x_stride = x_stride // UNIT * UNIT
    column_tiles = tl.cdiv(width, COLUMNS).to(tl.int32)
    tile = tl.program_id(0)
    column_start = (tile % column_tiles).to(tl.int64) * COLUMNS
    rows = (tile // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = column_start + tl.arange(0, COLUMNS)
    inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
    keep = rows_keep(tl.load(seed_ptr), threshold, rows, column_start, TAG, ROWS, COLUMNS)
    out = tl.where(keep, x.to(tl.float32) * scale, 0.0)
    out_ptrs = out_ptr + rows[:, None] * width + columns[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)


# --- Launchers ------------------------------------------------------------------------------------


def dropout_unsupported(x: Tensor, seed: Tensor, p: float) -> "str | None":
    """Why the kernel cannot take a call, or None."""
    return unsupported_rows(x)


@functools.lru_cache
def _tile(n_rows: int, width: int) -> tuple[int, int]:
    """(ROWS, COLUMNS) of a tile of 2048 elements: with 4 warps, 16 elements a thread.

    16 elements are one Philox call and, in 16 bits, two accesses of 16 bytes. 256 columns waste
    little of a row of any width and are long enough to coalesce; one long row fills a tile alone.
    """
    if n_rows < 8 and width > 256:
        return 1, 2048
    columns = min(256, max(16, power_of_2(width)))
    return 2048 // columns, columns


def dropout_fwd(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x o keep / (1 - p), as reference.dropout_fwd."""
    width = x.shape[-1] if x.dim() else 1
    n_rows = x.numel() // width
    rows, stride = as_rows(x, width)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    ROWS, COLUMNS = _tile(n_rows, width)
    launch(
        _dropout_kernel,
        (cdiv(n_rows, ROWS) * cdiv(width, COLUMNS),),
        rows,
        out,
        seed,
        stride,
        n_rows,
        width,
        *dropout_arguments(p),
        UNIT=unit(width, stride),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    return out


def dropout_bwd(grad_out: Tensor, seed: Tensor, p: float) -> Tensor:
    """The same function of the gradient."""
    return dropout_fwd(grad_out, seed, p)
