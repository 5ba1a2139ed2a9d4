"""Dropout + add + layer norm on Triton: launch configurations and launches.

The kernels are in layer_norm_forward.py and layer_norm_backward.py. Each tensor is read and written
once while a row fits on chip; wider rows are walked in blocks, twice.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from fusedformer.kernels.triton.launch import (
    cdiv,
    chip,
    launch,
    power_of_2,
    unsupported_device,
    unsupported_rows,
)
from fusedformer.kernels.triton.layer_norm_backward import (
    layer_norm_bwd_kernel,
    layer_norm_weight_grads_kernel,
    layer_norm_wide_bwd_kernel,
)
from fusedformer.kernels.triton.layer_norm_forward import (
    layer_norm_fwd_kernel,
    layer_norm_wide_fwd_kernel,
)
from fusedformer.kernels.triton.rows import as_rows, dropout_arguments, unit

__all__ = [
    "dropout_add_layer_norm_bwd",
    "dropout_add_layer_norm_fwd",
    "dropout_add_layer_norm_unsupported",
    "unsupported_device",
]

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


# Of shared memory, in which a program's next tile arrives while it works on this one.
STAGED_BYTES = 49152


@dataclass(frozen=True)
class Config:
    """A launch configuration: how many rows at a time, in what blocks, by how many warps."""

    rows: int
    block: int
    warps: int
    wide: bool  # a row is walked block after block, as more than there is room for
    stages: int = 1  # 2: the next tile is read meanwhile


def _one_block(width: int, tile: int, elements: int) -> Config:
    """A row a block and as many rows as fill the tile, with so many elements a thread."""
    block = max(16, power_of_2(width))
    rows = max(1, tile // block)
    warps = max(4, min(16, rows * block // (32 * elements)))
    return Config(rows, block, warps, wide=False)


@functools.cache
def forward_config(width: int) -> Config:
    """Tiles of the forward: up to 32 elements a thread, in blocks of 8, which are an access of
    16 bytes in 16 bits: so many that few warps, and up to 1024 columns one, add up a row."""
    if width <= 128:
        return _one_block(width, 2048, 16)
    if width <= 16384:
        warps = max(1, power_of_2(width) // 1024)
        return Config(max(1, 1024 // power_of_2(width)), 256 * warps, warps, wide=False)
    return Config(1, 4096, 8, wide=True)


@functools.cache
def backward_config(width: int, replayed: bool, bytes_read: int) -> Config:
    """Tiles of the backward: 8 elements a thread, as it holds the sums of two gradients as well.

    Or 16, where a row is then shared by few warps that can have the registers: what is done once a
    row, and a call of Philox, is 16 elements' work.

    Args:
        width: of a row.
        replayed: z is made again, with dropout, so that the mask takes registers throughout.
        bytes_read: of all tensors, for an element.
    """
    # 8192 columns are 16 elements a thread of 16 warps, and would spill if replayed, were it not
    # for those that wait in shared memory.
    staged = power_of_2(width) * bytes_read <= STAGED_BYTES
    if width <= (4096 if replayed and not staged else 8192):
        if 512 < width <= 2048:
            tile = Config(1, power_of_2(width), power_of_2(width) // 512, wide=False)
        else:
            # Below 256 columns a thread's elements lie in several rows: fewer, or they spill.
            tile = _one_block(width, 1024 if width > 128 else 512, 8)
        return dataclasses.replace(tile, stages=2 if staged else 1)
    # Four rows share the traffic of the weight sums that a wide row cannot keep in registers.
    return Config(4, 1024, 16, wide=True)


def backward_programs(n_rows: int, config: Config, device: torch.device) -> int:
    """How many programs share the rows, and so how many rows of weight sums there are.

    As many as registers leave room for at once: 6144 columns a multiprocessor, or four tiles of
    several rows.
    """
    at_once = max(1, 6144 // config.block) if config.rows == 1 else max(1, 16 // config.warps)
    return min(cdiv(n_rows, config.rows), chip(device).multiprocessors * at_once)


def dropout_add_layer_norm_unsupported(
    x: Tensor,
    residual: "Tensor | None",
    weight: "Tensor | None",
    bias: "Tensor | None",
    *rest: object,
) -> "str | None":
    """Why these kernels cannot take a call, or None."""
    return unsupported_rows(x, residual, weight, bias)


def _rows(tensor: "Tensor | None", width: int) -> "tuple[Tensor | None, int]":
    return (None, 0) if tensor is None else as_rows(tensor, width)


def _vector(tensor: "Tensor | None") -> "Tensor | None":
    return None if tensor is None else tensor.contiguous()


def _dropout_arguments(seed: "Tensor | None", p: float) -> tuple[int, float]:
    return (0, 1.0) if seed is None else dropout_arguments(p)


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def dropout_add_layer_norm_fwd(
    x: Tensor,
    residual: "Tensor | None",
    weight: "Tensor | None",
    bias: "Tensor | None",
    seed: "Tensor | None",
    dropout_p: float,
    eps: float,
    is_rms_norm: bool,
    prenorm: bool,
    z_dtype: torch.dtype,
) -> "tuple[Tensor, Tensor | None, Tensor | None, Tensor]":
    """(y, z, mean, rstd), as reference.dropout_add_layer_norm_fwd."""
    width = x.shape[-1]
    n_rows = x.numel() // width
    config = forward_config(width)
    x_rows, x_stride = as_rows(x, width)
    residual_rows, residual_stride = _rows(residual, width)
    y = _like(x, x.dtype)
    z = _like(x, z_dtype) if prenorm else None
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    mean = None if is_rms_norm else torch.empty_like(rstd)
    blocks = cdiv(width, config.block)
    whole = {} if config.wide else {"BLOCKS": blocks, "WHOLE": width == blocks * config.block}
    launch(
        layer_norm_wide_fwd_kernel if config.wide else layer_norm_fwd_kernel,
        (cdiv(n_rows, config.rows),),
        *(x_rows, residual_rows, _vector(weight), _vector(bias), seed, y, z, mean, rstd),
        *(x_stride, residual_stride, n_rows, width),
        *_dropout_arguments(seed, dropout_p),
        eps,
        UNIT=unit(width, x_stride, residual_stride),
        Z_DTYPE=TRITON_DTYPES[z_dtype],
        ROWS=config.rows,
        BLOCK=config.block,
        **whole,
        num_warps=config.warps,
    )
    return y, z, mean, rstd


def _sums(
    parameter: "Tensor | None", wanted: bool, programs: int
) -> "tuple[Tensor | None, Tensor | None]":
    """Room for the sums of a parameter's gradient, a row a program, and for the gradient."""
    if parameter is None or not wanted:
        return None, None
    sums = parameter.new_empty((programs, *parameter.shape), dtype=torch.float32)
    return sums, torch.empty_like(parameter, memory_format=torch.contiguous_format)


def _add_up(*pairs: "tuple[Tensor | None, Tensor | None]") -> None:
    """Each gradient from its sums, in a fixed order; one launch for both."""
    wanted = [(sums, grad) for sums, grad in pairs if sums is not None]
    if not wanted:
        return
    (sums, grad), (more_sums, more_grad) = (*wanted, (None, None))[:2]
    programs, width = wanted[0][0].shape
    launch(
        layer_norm_weight_grads_kernel,
        (len(wanted) * cdiv(width, 32),),
        *(sums, grad, more_sums, more_grad, programs, width),
        UNIT=unit(width),
        PROGRAMS=256,
        BLOCK=32,
        num_warps=8,
    )


def dropout_add_layer_norm_bwd(
    grad_y: Tensor,
    grad_z: "Tensor | None",
    source: Tensor,
    residual: "Tensor | None",
    weight: "Tensor | None",
    bias: "Tensor | None",
    seed: "Tensor | None",
    mean: "Tensor | None",
    rstd: Tensor,
    dropout_p: float,
    is_rms_norm: bool,
    prenorm: bool,
    z_dtype: torch.dtype,
    residual_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> "tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]":
    """(dx, dresidual, dweight, dbias), as reference.dropout_add_layer_norm_bwd.

    Beside these, dweight and dbias need a float32 row of sums for each of backward_programs().
    """
    width = source.shape[-1]
    n_rows = source.numel() // width
    read = (source, residual, grad_y, grad_z)
    config = backward_config(
        width,
        replayed=seed is not None and not prenorm,
        bytes_read=sum(tensor.element_size() for tensor in read if tensor is not None),
    )
    programs = backward_programs(n_rows, config, source.device)
    source_rows, source_stride = as_rows(source, width)
    residual_rows, residual_stride = _rows(residual, width)
    grad_y_rows, grad_y_stride = as_rows(grad_y, width)
    grad_z_rows, grad_z_stride = _rows(grad_z, width)
    grad_x = _like(source, grad_y.dtype)
    grad_residual = _like(source, z_dtype) if residual_grad else None
    weight_sums, grad_weight = _sums(weight, weight_grad, programs)
    bias_sums, grad_bias = _sums(bias, bias_grad, programs)
    launch(
        layer_norm_wide_bwd_kernel if config.wide else layer_norm_bwd_kernel,
        (programs,),
        *(source_rows, residual_rows, _vector(weight), seed, mean, rstd, grad_y_rows, grad_z_rows),
        *(grad_x, grad_residual, weight_sums, bias_sums),
        *(source_stride, residual_stride, grad_y_stride, grad_z_stride, n_rows, width),
        *_dropout_arguments(seed, dropout_p),
        UNIT=unit(width, source_stride, residual_stride, grad_y_stride, grad_z_stride),
        PRENORM=prenorm,
        Z_DTYPE=TRITON_DTYPES[z_dtype],
        ROWS=config.rows,
        BLOCK=config.block,
        **({} if config.wide else {"STAGES": config.stages}),
        num_warps=config.warps,
    )
    _add_up((weight_sums, grad_weight), (bias_sums, grad_bias))
    return grad_x, grad_residual, grad_weight, grad_bias
