"""The backward kernels of dropout + add + layer norm.

A program walks many tiles of rows and sums their weight gradients; the sums of all programs are
added up in a fixed order by another kernel. No atomics: the result is bitwise repeatable.
"""

import triton
import triton.language as tl

from fusedformer.kernels.triton.layer_norm_forward import (
    NUMBERS,
    added,
    dropped,
    keep_tile,
    load_seed,
    load_tile,
    load_vector,
    store_tile,
)


@triton.jit
def _row_statistics(mean_ptr, rstd_ptr, rows, inside, ROWS: tl.constexpr):
    rstd = tl.load(rstd_ptr + rows, mask=inside, other=0.0)
    mean = tl.zeros([ROWS], tl.float32)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + rows, mask=inside, other=0.0)
    return mean, rstd


@triton.jit(do_not_specialize=NUMBERS)
def layer_norm_bwd_kernel(
    source_ptr,  # (n_rows, width): z if PRENORM, else x
    residual_ptr,  # the same or None
    weight_ptr,  # (width,) or None
    seed_ptr,  # int64, or None: no dropout
    mean_ptr,  # (n_rows,) float32, or None: RMS norm
    rstd_ptr,  # (n_rows,) float32
    grad_y_ptr,  # (n_rows, width)
    grad_z_ptr,  # the same or None
    grad_x_ptr,  # (n_rows, width), contiguous
    grad_residual_ptr,  # the same or None
    weight_sums_ptr,  # (programs, width) float32, or None
    bias_sums_ptr,  # the same or None
    source_stride: tl.int64,
    residual_stride: tl.int64,
    grad_y_stride: tl.int64,
    grad_z_stride: tl.int64,
    n_rows: tl.int64,
    width: tl.int32,
    threshold: tl.uint32,
    scale,  # 1 / (1 - p)
    UNIT: tl.constexpr,  # width and strides are multiples of it
    PRENORM: tl.constexpr,
    Z_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # >= width
    STAGES: tl.constexpr,  # 2: a tile is read while the one before it is worked on
):
    width = width // UNIT * UNIT
    source_stride, residual_stride = source_stride // UNIT * UNIT, residual_stride // UNIT * UNIT
    grad_y_stride, grad_z_stride = grad_y_stride // UNIT * UNIT, grad_z_stride // UNIT * UNIT
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    column_inside = columns < width
    weight = load_vector(weight_ptr, columns, column_inside, 1.0)
    weight_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    share = 1.0 / width
    tiles = tl.cdiv(n_rows, ROWS)
    for tile in tl.range(program, tiles, tl.num_programs(0), num_stages=STAGES):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        row_inside = rows < n_rows
        inside = row_inside[:, None] & column_inside[None, :]
        mean, rstd = _row_statistics(mean_ptr, rstd_ptr, rows, row_inside, ROWS)
        grad_y = load_tile(grad_y_ptr, rows, grad_y_stride, columns, inside)
        source = load_tile(source_ptr, rows, source_stride, columns, inside)
        residual = load_tile(residual_ptr, rows, residual_stride, columns, inside)
        if not PRENORM:
            keep = keep_tile(load_seed(seed_ptr), threshold, rows, 0, ROWS, BLOCK)
            source = added(source, residual, keep, scale, Z_DTYPE)
        normed = (source - mean[:, None]) * rstd[:, None]
        if weight_sums_ptr is not None:
            weight_sums += grad_y * normed
        if bias_sums_ptr is not None:
            bias_sums += grad_y
        if BLOCK > 4096 and seed_ptr is not None and not PRENORM:
            # 16 elements a thread and a mask made again: no room to hold weights as well.
            grad_normed = grad_y * load_vector(weight_ptr, columns, column_inside, 1.0)
        else:
            grad_normed = grad_y * weight
        grad = grad_normed - normed * (tl.sum(grad_normed * normed, 1) * share)[:, None]
        if mean_ptr is not None:
            grad -= (tl.sum(grad_normed, 1) * share)[:, None]
        # Loaded last, as what only the end needs takes registers from the sums.
        grad_z = load_tile(grad_z_ptr, rows, grad_z_stride, columns, inside)
        grad = grad * rstd[:, None] + grad_z
        store_tile(grad_residual_ptr, rows, width, columns, inside, grad)
        if PRENORM:
            keep = keep_tile(load_seed(seed_ptr), threshold, rows, 0, ROWS, BLOCK)
        grad = dropped(grad, keep, scale)
        store_tile(grad_x_ptr, rows, width, columns, inside, grad)
    sums_at = program.to(tl.int64) * width + columns
    if weight_sums_ptr is not None:
        tl.store(weight_sums_ptr + sums_at, tl.sum(weight_sums, 0), mask=column_inside)
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + sums_at, tl.sum(bias_sums, 0), mask=column_inside)


@triton.jit
def _accumulate(ptr, at, started, inside, addend):
    if ptr is not None:
        before = tl.load(ptr + at, mask=inside & started, other=0.0)
        tl.store(ptr + at, before + addend, mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def layer_norm_wide_bwd_kernel(
    source_ptr, residual_ptr, weight_ptr, seed_ptr, mean_ptr, rstd_ptr, grad_y_ptr, grad_z_ptr,
    grad_x_ptr, grad_residual_ptr, weight_sums_ptr, bias_sums_ptr,
    source_stride: tl.int64, residual_stride: tl.int64, grad_y_stride: tl.int64,
    grad_z_stride: tl.int64, n_rows: tl.int64, width: tl.int32, threshold: tl.uint32, scale,
    UNIT: tl.constexpr, PRENORM: tl.constexpr, Z_DTYPE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """layer_norm_bwd_kernel for rows wider than a block: row sums first, then a second walk.

    A program's weight sums lie in memory, its own row of them; several rows a tile make that
    little traffic.
    """
    width = width // UNIT * UNIT
    source_stride, residual_stride = source_stride // UNIT * UNIT, residual_stride // UNIT * UNIT
    grad_y_stride, grad_z_stride = grad_y_stride // UNIT * UNIT, grad_z_stride // UNIT * UNIT
    program = tl.program_id(0)
    seed = load_seed(seed_ptr)
    for tile in range(program, tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        row_inside = rows < n_rows
        mean, rstd = _row_statistics(mean_ptr, rstd_ptr, rows, row_inside, ROWS)
        sums = tl.zeros([ROWS], tl.float32)
        products = tl.zeros([ROWS], tl.float32)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            column_inside = columns < width
            inside = row_inside[:, None] & column_inside[None, :]
            grad_y = load_tile(grad_y_ptr, rows, grad_y_stride, columns, inside)
            source = load_tile(source_ptr, rows, source_stride, columns, inside)
            residual = load_tile(residual_ptr, rows, residual_stride, columns, inside)
            if not PRENORM:
                keep = keep_tile(seed, threshold, rows, start, ROWS, BLOCK)
                source = added(source, residual, keep, scale, Z_DTYPE)
            normed = (source - mean[:, None]) * rstd[:, None]
            grad_normed = grad_y * load_vector(weight_ptr, columns, column_inside, 1.0)
            sums += tl.sum(grad_normed, 1)
            products += tl.sum(grad_normed * normed, 1)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            column_inside = columns < width
            inside = row_inside[:, None] & column_inside[None, :]
            grad_y = load_tile(grad_y_ptr, rows, grad_y_stride, columns, inside)
            source = load_tile(source_ptr, rows, source_stride, columns, inside)
            residual = load_tile(residual_ptr, rows, residual_stride, columns, inside)
            if not PRENORM:
                keep = keep_tile(seed, threshold, rows, start, ROWS, BLOCK)
                source = added(source, residual, keep, scale, Z_DTYPE)
            normed = (source - mean[:, None]) * rstd[:, None]
            sums_at = program.to(tl.int64) * width + columns
            # A whole vector, because the interpreter's scalars are no masks.
            started = tl.full([BLOCK], tile, tl.int32) > program
            _accumulate(
                weight_sums_ptr, sums_at, started, column_inside, tl.sum(grad_y * normed, 0)
            )
            _accumulate(bias_sums_ptr, sums_at, started, column_inside, tl.sum(grad_y, 0))
            grad_normed = grad_y * load_vector(weight_ptr, columns, column_inside, 1.0)
            grad = grad_normed - normed * (products / width)[:, None]
            if mean_ptr is not None:
                grad -= (sums / width)[:, None]
            grad_z = load_tile(grad_z_ptr, rows, grad_z_stride, columns, inside)
            grad = grad * rstd[:, None] + grad_z
            store_tile(grad_residual_ptr, rows, width, columns, inside, grad)
            if PRENORM:
                keep = keep_tile(seed, threshold, rows, start, ROWS, BLOCK)
            grad = dropped(grad, keep, scale)
            store_tile(grad_x_ptr, rows, width, columns, inside, grad)
        # The next tile reads these sums, in threads that need not be those that wrote them.
        tl.debug_barrier()


@triton.jit
def _add_up(
    sums_ptr, grad_ptr, block, programs, width, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr
):
    columns = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([PROGRAMS, BLOCK], tl.float32)
    for start in range(0, programs, PROGRAMS):
        program = (start + tl.arange(0, PROGRAMS)).to(tl.int64)
        inside = (program < programs)[:, None] & (columns < width)[None, :]
        total += load_tile(sums_ptr, program, width, columns, inside)
    grad = tl.sum(total, 0).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + columns, grad, mask=columns < width)


@triton.jit(do_not_specialize=NUMBERS)
def layer_norm_weight_grads_kernel(
    sums_ptr,  # (programs, width) float32: of the weight or of the bias
    grad_ptr,  # (width,)
    more_sums_ptr,  # the same for the other one, or None
    more_grad_ptr,
    programs: tl.int32,
    width: tl.int32,
    UNIT: tl.constexpr,  # width is a multiple of it
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums over programs, in a fixed order; a block of columns of either is a program's."""
    width = width // UNIT * UNIT
    blocks = tl.cdiv(width, BLOCK)
    block = tl.program_id(0)
    if block < blocks:
        _add_up(sums_ptr, grad_ptr, block, programs, width, PROGRAMS, BLOCK)
    elif more_sums_ptr is not None:
        _add_up(more_sums_ptr, more_grad_ptr, block - blocks, programs, width, PROGRAMS, BLOCK)
