"""The forward kernels of dropout + add + layer norm, and the tiles of both directions.

Tiles are (ROWS, BLOCK). A pointer that is None is a compile-time choice: no such tensor.
"""

import triton
import triton.language as tl

from fusedformer.kernels import rng
from fusedformer.kernels.triton.random import rows_keep

TAG = tl.constexpr(rng.DROPOUT_ADD_NORM)

# Of all kernels: compiled once for all sizes; UNIT says what accesses need to know of them.
NUMBERS = (
    "x_stride", "source_stride", "residual_stride", "grad_y_stride", "grad_z_stride",
    "n_rows", "width", "threshold", "programs",
)  # fmt: skip


@triton.jit
def load_tile(ptr, rows, stride, columns, inside):
    """A tile in float32, 0 outside; 0 where there is no tensor."""
    tile = 0.0
    if ptr is not None:
        at = ptr + rows[:, None] * stride + columns[None, :]
        tile = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return tile


@triton.jit
def store_tile(ptr, rows, stride, columns, inside, tile):
    if ptr is not None:
        at = ptr + rows[:, None] * stride + columns[None, :]
        tl.store(at, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_vector(ptr, columns, inside, default):
    """A block of a vector as (1, BLOCK) in float32; a number where there is no tensor."""
    block = default
    if ptr is not None:
        block = tl.load(ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return block


@triton.jit
def _block_of_rows(block, row_inside, width, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """The columns of a block, and which of a tile's elements there are."""
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = row_inside[:, None]
    if not WHOLE:
        inside = inside & (columns < width)[None, :]
    return columns, inside


@triton.jit
def load_seed(seed_ptr):
    """The seed; None where nothing is dropped."""
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    return seed


@triton.jit
def keep_tile(seed, threshold, rows, start, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements of a tile are kept; None where nothing is dropped."""
    keep = None
    if seed is not None:
        keep = rows_keep(seed, threshold, rows, start, TAG, ROWS, BLOCK)
    return keep


@triton.jit
def dropped(tile, keep, scale):
    if keep is not None:
        tile = tl.where(keep, tile * scale, 0.0)
    return tile


@triton.jit
def added(x, residual, keep, scale, Z_DTYPE: tl.constexpr):
    """z = residual + dropout(x), rounded to its dtype."""
    return (dropped(x, keep, scale) + residual).to(Z_DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=NUMBERS)
def layer_norm_fwd_kernel(
    x_ptr,  # (n_rows, width), rows x_stride apart
    residual_ptr,  # the same or None
    weight_ptr,  # (width,) or None
    bias_ptr,  # (width,) or None
    seed_ptr,  # int64, or None: no dropout
    y_ptr,  # (n_rows, width), contiguous
    z_ptr,  # the same or None
    mean_ptr,  # (n_rows,) float32, or None: RMS norm
    rstd_ptr,  # (n_rows,) float32
    x_stride: tl.int64,
    residual_stride: tl.int64,
    n_rows: tl.int64,
    width: tl.int32,
    threshold: tl.uint32,
    scale,  # 1 / (1 - p)
    eps,
    UNIT: tl.constexpr,  # width and strides are multiples of it
    Z_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of a row, all of them held at once
    WHOLE: tl.constexpr,  # width == BLOCK * BLOCKS
):
    width = width // UNIT * UNIT
    x_stride, residual_stride = x_stride // UNIT * UNIT, residual_stride // UNIT * UNIT
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_inside = (rows < n_rows) | (ROWS == 1)  # a program a row: no mask
    seed = load_seed(seed_ptr)
    # All is read before anything is written, as the compiler cannot know that it may be.
    xs, residuals = (), ()  # type: tuple, tuple
    for block in tl.static_range(BLOCKS):
        columns, inside = _block_of_rows(block, row_inside, width, BLOCK, WHOLE)
        xs += (load_tile(x_ptr, rows, x_stride, columns, inside),)
        residuals += (load_tile(residual_ptr, rows, residual_stride, columns, inside),)
    zs = ()  # type: tuple
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in tl.static_range(BLOCKS):
        columns, inside = _block_of_rows(block, row_inside, width, BLOCK, WHOLE)
        keep = keep_tile(seed, threshold, rows, block * BLOCK, ROWS, BLOCK)
        z = added(xs[block], residuals[block], keep, scale, Z_DTYPE)
        store_tile(z_ptr, rows, width, columns, inside, z)
        sums += z
        zs += (z,)
    mean = tl.zeros([ROWS], tl.float32)
    if mean_ptr is not None:
        mean = tl.sum(sums, 1) / width
        tl.store(mean_ptr + rows, mean, mask=row_inside)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in tl.static_range(BLOCKS):
        columns, inside = _block_of_rows(block, row_inside, width, BLOCK, WHOLE)
        difference = zs[block] - mean[:, None]
        if mean_ptr is not None and not WHOLE:
            difference = tl.where(inside, difference, 0.0)
        squares += difference * difference
    rstd = tl.rsqrt(tl.sum(squares, 1) / width + eps)
    tl.store(rstd_ptr + rows, rstd, mask=row_inside)
    for block in tl.static_range(BLOCKS):
        columns, inside = _block_of_rows(block, row_inside, width, BLOCK, WHOLE)
        weight = load_vector(weight_ptr, columns, columns < width, 1.0)
        bias = load_vector(bias_ptr, columns, columns < width, 0.0)
        y = (zs[block] - mean[:, None]) * rstd[:, None] * weight + bias
        store_tile(y_ptr, rows, width, columns, inside, y)


@triton.jit(do_not_specialize=NUMBERS)
def layer_norm_wide_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, z_ptr, mean_ptr, rstd_ptr,
    x_stride: tl.int64, residual_stride: tl.int64, n_rows: tl.int64, width: tl.int32,
    threshold: tl.uint32, scale, eps,
    UNIT: tl.constexpr, Z_DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """layer_norm_fwd_kernel for rows wider than a block: statistics first, then a second walk."""
    width = width // UNIT * UNIT
    x_stride, residual_stride = x_stride // UNIT * UNIT, residual_stride // UNIT * UNIT
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_inside = rows < n_rows
    mean = tl.zeros([ROWS], tl.float32)
    seed = load_seed(seed_ptr)
    squares = tl.zeros([ROWS], tl.float32)  # sum of (z - mean)^2 over the columns so far
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = row_inside[:, None] & (columns < width)[None, :]
        x = load_tile(x_ptr, rows, x_stride, columns, inside)
        residual = load_tile(residual_ptr, rows, residual_stride, columns, inside)
        keep = keep_tile(seed, threshold, rows, start, ROWS, BLOCK)
        z = added(x, residual, keep, scale, Z_DTYPE)
        store_tile(z_ptr, rows, width, columns, inside, z)
        if mean_ptr is not None:
            # A block's mean and squares merge into those of the columns before (Chan et al. 1979).
            share = tl.minimum(width - start, BLOCK).to(tl.float32)
            fraction = share / tl.minimum(width, start + BLOCK).to(tl.float32)
            block_mean = tl.sum(z, 1) / share
            z = tl.where(inside, z - block_mean[:, None], 0.0)
            shift = block_mean - mean
            mean += shift * fraction
            squares += shift * shift * (share - share * fraction)
        squares += tl.sum(z * z, 1)
    rstd = tl.rsqrt(squares / width + eps)
    tl.store(rstd_ptr + rows, rstd, mask=row_inside)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=row_inside)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        column_inside = columns < width
        inside = row_inside[:, None] & column_inside[None, :]
        x = load_tile(x_ptr, rows, x_stride, columns, inside)
        residual = load_tile(residual_ptr, rows, residual_stride, columns, inside)
        keep = keep_tile(seed, threshold, rows, start, ROWS, BLOCK)
        z = added(x, residual, keep, scale, Z_DTYPE)
        weight = load_vector(weight_ptr, columns, column_inside, 1.0)
        bias = load_vector(bias_ptr, columns, column_inside, 0.0)
        y = (z - mean[:, None]) * rstd[:, None] * weight + bias
        store_tile(y_ptr, rows, width, columns, inside, y)
