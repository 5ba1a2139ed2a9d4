"""The backward kernels of cross-entropy: one read of the logits, one write of their gradient.

Narrow rows are held whole, several a program; a block of a wide row has a program.
"""

import triton
import triton.language as tl

from fusedformer.kernels.triton.cross_entropy_forward import (
    INTEGERS,
    exponential,
    row_targets,
    sum_of_weights,
)


@triton.jit
def _coefficients(
    grad_losses_ptr, grad_stride, lse_ptr, target_ptr, weight_ptr, weight_sum_ptr,
    rows, inside, classes, ignore_index, share, uniform,
    HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    """For each row what dx_j = slope p_j - hit [j = target] - rest w_j is made of."""
    target, ignored, bad, row_weight = row_targets(
        target_ptr, weight_ptr, rows, inside, classes, ignore_index, HAS_WEIGHT
    )
    lse = tl.load(lse_ptr + rows, mask=inside, other=0.0)
    grad = tl.load(grad_losses_ptr + rows * grad_stride, mask=inside, other=0.0)
    grad = tl.where(bad, float("nan"), grad)  # and so all that it is multiplied with
    hit = grad * share * row_weight
    slope = hit
    if SMOOTHING:
        slope += grad * uniform * sum_of_weights(weight_sum_ptr, classes, HAS_WEIGHT)
    return target, ignored, lse, slope, hit, grad * uniform


@triton.jit
def _gradient(
    x, columns, weight_ptr, in_columns, target, ignored, lse, slope, hit, rest,
    HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    grad = slope * exponential(x.to(tl.float32) - lse)
    if SMOOTHING:
        if HAS_WEIGHT:
            rest *= tl.load(weight_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
        grad -= rest
    grad -= tl.where(columns == target, hit, 0.0)
    return tl.where(ignored, 0.0, grad)


@triton.jit(do_not_specialize=INTEGERS)
def cross_entropy_narrow_bwd_kernel(
    logits_ptr,  # (n_rows, classes), rows rows_stride apart
    grad_ptr,  # (n_rows, classes), rows grad_stride apart; may be logits_ptr
    grad_losses_ptr,  # (n_rows,) float32, losses_stride apart
    lse_ptr,  # (n_rows,) float32
    target_ptr, weight_ptr, weight_sum_ptr,  # as in the forward
    rows_stride: tl.int64,
    grad_stride: tl.int64,
    losses_stride: tl.int64,
    n_rows: tl.int64,
    classes: tl.int32,
    ignore_index: tl.int64,
    share, uniform,  # as in the forward
    HAS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    UNIT: tl.constexpr,  # classes and both strides are multiples of it
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # >= classes
):  # fmt: skip
    classes = classes // UNIT * UNIT
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    in_rows, in_columns = rows < n_rows, columns < classes
    inside = in_rows[:, None] & in_columns
    x_offsets = (rows * (rows_stride // UNIT * UNIT))[:, None] + columns
    x = tl.load(logits_ptr + x_offsets, mask=inside, other=0.0)
    target, ignored, lse, slope, hit, rest = _coefficients(
        grad_losses_ptr, losses_stride, lse_ptr, target_ptr, weight_ptr, weight_sum_ptr,
        rows, in_rows, classes, ignore_index, share, uniform, HAS_WEIGHT, SMOOTHING,
    )  # fmt: skip
    grad = _gradient(
        x, columns, weight_ptr, in_columns, target[:, None], ignored[:, None], lse[:, None],
        slope[:, None], hit[:, None], rest[:, None], HAS_WEIGHT, SMOOTHING,
    )  # fmt: skip
    grad_offsets = (rows * (grad_stride // UNIT * UNIT))[:, None] + columns
    tl.store(grad_ptr + grad_offsets, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=INTEGERS)
def cross_entropy_wide_bwd_kernel(
    logits_ptr,  # (n_rows, classes), rows rows_stride apart
    grad_ptr,  # (n_rows, classes), rows grad_stride apart; may be logits_ptr
    grad_losses_ptr,  # (n_rows,) float32, losses_stride apart
    lse_ptr,  # (n_rows,) float32
    target_ptr, weight_ptr, weight_sum_ptr,  # as in the forward
    rows_stride: tl.int64,
    grad_stride: tl.int64,
    losses_stride: tl.int64,
    blocks: tl.int32,  # programs a row
    classes: tl.int32,
    ignore_index: tl.int64,
    share, uniform,  # as in the forward
    HAS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ALIGNED: tl.constexpr,  # classes and both strides are multiples of UNIT
    SAME_STRIDE: tl.constexpr,  # of logits and gradient
    UNIT: tl.constexpr,  # elements of a 16-byte access
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    target, ignored, lse, slope, hit, rest = _coefficients(
        grad_losses_ptr, losses_stride, lse_ptr, target_ptr, weight_ptr, weight_sum_ptr,
        row, row >= 0, classes, ignore_index, share, uniform, HAS_WEIGHT, SMOOTHING,
    )  # fmt: skip
    start = row * rows_stride
    shift = 0
    if ALIGNED:
        classes = classes // UNIT * UNIT
    else:
        shift = (start % UNIT).to(tl.int32)
    start = start // UNIT * UNIT
    block_start = tl.program_id(0) % blocks * COLUMNS
    block_end = block_start + COLUMNS
    logits_ptr += start
    if SAME_STRIDE:
        grad_ptr += start
    elif ALIGNED:
        grad_ptr += row * grad_stride // UNIT * UNIT
    else:
        grad_ptr += row * grad_stride - shift
    if not ALIGNED and ((block_start < shift) | (block_end > shift + classes)):
        # Element by element, and few at a time: their addresses would take the registers of all.
        for piece_start in range(block_start, block_end, PIECE):
            offsets = piece_start + tl.arange(0, PIECE)
            columns = offsets - shift
            inside = (columns >= 0) & (columns < classes)
            x = tl.load(logits_ptr + offsets, mask=inside, other=0.0)
            grad = _gradient(
                x, columns, weight_ptr, inside, target, ignored, lse, slope, hit, rest,
                HAS_WEIGHT, SMOOTHING,
            )  # fmt: skip
            tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask=inside)
    else:
        offsets = block_start + tl.arange(0, COLUMNS)
        columns = offsets - shift
        inside = columns < classes
        if ALIGNED:
            x = tl.load(logits_ptr + offsets, mask=inside, other=0.0)
        else:
            x = tl.load(logits_ptr + offsets)
        grad = _gradient(
            x, columns, weight_ptr, inside, target, ignored, lse, slope, hit, rest,
            HAS_WEIGHT, SMOOTHING,
        )  # fmt: skip
        if ALIGNED:
            tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty))
