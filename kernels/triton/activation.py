"""Bias + activation + dropout on Triton: kernels, then launchers."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedformer.kernels import rng
from fusedformer.kernels.triton.launch import (
    cdiv,
    chip,
    launch,
    power_of_2,
    unsupported_device,
    unsupported_rows,
)
from fusedformer.kernels.triton.random import rows_keep
from fusedformer.kernels.triton.rows import as_rows, dropout_arguments, unit

__all__ = [
    "bias_activation_bwd",
    "bias_activation_fwd",
    "bias_activation_unsupported",
    "unsupported_device",
]

TAG = tl.constexpr(rng.BIAS_ACTIVATION)

# In the interpreter a constexpr must be the right operand of a tensor.
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


# --- Kernels --------------------------------------------------------------------------------------


@triton.jit
def _logistic(z):
    # Both ends are right: exp overflows to inf, whose inverse is 0.
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """act(z), float32."""
    if ACTIVATION == "relu":
        out = tl.where(z <= 0, 0.0, z)  # a NaN stays one
    elif ACTIVATION == "silu":
        out = z * _logistic(z)
    elif ACTIVATION == "gelu":
        out = z * (0.5 + 0.5 * tl.math.erf(z * SQRT_HALF))
    else:  # (1 + tanh u) / 2 is the logistic function of 2 u
        out = z * _logistic(z * SQRT_8_OVER_PI * (1.0 + z * z * CUBIC))
    return out


@triton.jit
def _logistic_both(z):
    """The logistic function s of z, and 1 - s without the subtraction's cancellation."""
    tail = tl.exp(-tl.abs(z))
    near = 1.0 / (1.0 + tail)
    far = tail * near
    return tl.where(z >= 0, near, far), tl.where(z >= 0, far, near)


@triton.jit
def _slope(z, ACTIVATION: tl.constexpr):
    """act'(z), float32."""
    if ACTIVATION == "relu":
        slope = tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        s, rest = _logistic_both(z)
        slope = s * (1.0 + z * rest)
    elif ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.math.erf(z * SQRT_HALF)
        slope = cdf + z * (tl.exp(-0.5 * z * z) * INV_SQRT_2PI)
    else:
        s, rest = _logistic_both(z * SQRT_8_OVER_PI * (1.0 + z * z * CUBIC))
        # In this order a large z meets the zero of s (1 - s) before its square can overflow.
        slope = s + z * s * rest * ((1.0 + z * z * 3.0 * CUBIC) * SQRT_8_OVER_PI)
    return slope


@triton.jit(do_not_specialize=["x_stride", "n_rows", "width", "threshold"])
def _bias_activation_fwd_kernel(
    x_ptr,  # (n_rows, width), rows x_stride apart
    bias_ptr,  # (width,), if HAS_BIAS
    out_ptr,  # (n_rows, width), contiguous
    seed_ptr,  # int64, if DROPOUT
    x_stride: tl.int64,
    n_rows: tl.int64,
    width: tl.int32,
    threshold: tl.uint32,
    scale,  # 1 / (1 - p)
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    UNIT: tl.constexpr,  # width and x_stride are multiples of it
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    width = width // UNIT * UNIT
    x_stride = x_stride // UNIT * UNIT
    column_tiles = tl.cdiv(width, COLUMNS)
    tile = tl.program_id(0)
    column_start = tile % column_tiles * COLUMNS
    columns = column_start + tl.arange(0, COLUMNS)
    rows = (tile // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
    z = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
    z = z.to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < width, other=0.0)
        z += bias.to(tl.float32)[None, :]
    out = _activate(z, ACTIVATION)
    if DROPOUT:
        keep = rows_keep(tl.load(seed_ptr), threshold, rows, column_start, TAG, ROWS, COLUMNS)
        out = tl.where(keep, out * scale, 0.0)
    out_ptrs = out_ptr + rows[:, None] * width + columns[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["grad_stride", "x_stride", "n_rows", "width", "threshold", "groups"])
def _bias_activation_bwd_kernel(
    grad_ptr,  # (n_rows, width), rows grad_stride apart: of the output
    x_ptr,  # (n_rows, width), rows x_stride apart
    bias_ptr,  # (width,), if HAS_BIAS
    grad_x_ptr,  # (n_rows, width), contiguous
    partial_ptr,  # (groups, width) float32, if BIAS_GRAD: each group's sum
    seed_ptr,  # int64, if DROPOUT
    grad_stride: tl.int64,
    x_stride: tl.int64,
    n_rows: tl.int64,
    width: tl.int32,
    threshold: tl.uint32,
    scale,  # 1 / (1 - p)
    groups: tl.int64,  # programs that share the rows of a column tile
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    DROPOUT: tl.constexpr,
    UNIT: tl.constexpr,  # width, x_stride and grad_stride are multiples of it
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    width = width // UNIT * UNIT
    x_stride = x_stride // UNIT * UNIT
    grad_stride = grad_stride // UNIT * UNIT
    column_tiles = tl.cdiv(width, COLUMNS)
    group = (tl.program_id(0) // column_tiles).to(tl.int64)
    column_start = tl.program_id(0) % column_tiles * COLUMNS
    columns = column_start + tl.arange(0, COLUMNS)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        seed = tl.load(seed_ptr)
    # One sum for each element of a tile, so that threads meet only once, at the end.
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(group * ROWS, n_rows, groups * ROWS, num_stages=2):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
        x_ptrs = x_ptr + rows[:, None] * x_stride + columns[None, :]
        grad_ptrs = grad_ptr + rows[:, None] * grad_stride + columns[None, :]
        z = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptrs, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += bias
        if DROPOUT:
            keep = rows_keep(seed, threshold, rows, column_start, TAG, ROWS, COLUMNS)
            grad = tl.where(keep, grad * scale, 0.0)
        grad *= _slope(z, ACTIVATION)
        if BIAS_GRAD:
            sums += grad
        grad_x_ptrs = grad_x_ptr + rows[:, None] * width + columns[None, :]
        tl.store(grad_x_ptrs, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if BIAS_GRAD:
        tl.store(partial_ptr + group * width + columns, tl.sum(sums, 0), mask=columns < width)


# --- Launchers ------------------------------------------------------------------------------------


def bias_activation_unsupported(x: Tensor, bias: "Tensor | None", *args: object) -> "str | None":
    """Why the kernels cannot take a call, or None."""
    return unsupported_rows(x, bias)


@functools.lru_cache
def _tile(n_rows: int, width: int) -> tuple[int, int]:
    """(ROWS, COLUMNS) of a tile of 2048 elements: with 4 warps, 16 elements a thread.

    16 elements are one Philox call and, in 16 bits, two accesses of 16 bytes. 256 columns waste
    little of a row of any width, are long enough to coalesce (one warp reads a row's 512 bytes)
    and let a program reuse its bias; a few long rows are cut lengthwise instead. Up to 32 columns a
    thread's elements lie in many rows, whose offsets take registers: half a tile, or it spills.
    """
    if n_rows < 8 and width > 256:
        return 1, 2048
    columns = min(256, max(32, power_of_2(width)))
    return (2048 if columns > 32 else 1024) // columns, columns


# Programs of 4 warps that a multiprocessor is given in the backward: what runs at once with 128
# registers a thread, with a tile on its way for each; few enough partial sums to be negligible.
_PROGRAMS_PER_SM = 4


def bias_activation_fwd(
    x: Tensor, bias: "Tensor | None", seed: "Tensor | None", activation: str, dropout_p: float
) -> Tensor:
    """act(x + bias) o keep / (1 - p), as reference.bias_activation_fwd."""
    width = x.shape[-1]
    n_rows = x.numel() // width
    rows, stride = as_rows(x, width)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    ROWS, COLUMNS = _tile(n_rows, width)
    launch(
        _bias_activation_fwd_kernel,
        (cdiv(n_rows, ROWS) * cdiv(width, COLUMNS),),
        rows,
        rows if bias is None else bias.contiguous(),
        out,
        rows if seed is None else seed,
        stride,
        n_rows,
        width,
        *dropout_arguments(dropout_p),
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        DROPOUT=seed is not None,
        UNIT=unit(width, stride),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    return out


def bias_activation_bwd(
    grad_out: Tensor,
    x: Tensor,
    bias: "Tensor | None",
    seed: "Tensor | None",
    activation: str,
    dropout_p: float,
    bias_grad: bool,
) -> "tuple[Tensor, Tensor | None]":
    """dx and dbias, as reference.bias_activation_bwd.

    Beside these, dbias needs the float32 sums of four programs a multiprocessor, at most.
    """
    width = x.shape[-1]
    n_rows = x.numel() // width
    rows, stride = as_rows(x, width)
    grad_rows, grad_stride = as_rows(grad_out, width)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    ROWS, COLUMNS = _tile(n_rows, width)
    groups, column_tiles = cdiv(n_rows, ROWS), cdiv(width, COLUMNS)
    partial = None
    if bias is not None and bias_grad:
        programs = chip(x.device).multiprocessors * _PROGRAMS_PER_SM
        groups = min(groups, max(1, programs // column_tiles))
        partial = torch.empty(groups, width, dtype=torch.float32, device=x.device)
    launch(
        _bias_activation_bwd_kernel,
        (groups * column_tiles,),
        grad_rows,
        rows,
        rows if bias is None else bias.contiguous(),
        grad_x,
        grad_x if partial is None else partial,
        rows if seed is None else seed,
        grad_stride,
        stride,
        n_rows,
        width,
        *dropout_arguments(dropout_p),
        groups,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        BIAS_GRAD=partial is not None,
        DROPOUT=seed is not None,
        UNIT=unit(width, stride, grad_stride),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    if partial is None or bias is None:
        return grad_x, None
    return grad_x, partial.sum(0).to(bias.dtype)
