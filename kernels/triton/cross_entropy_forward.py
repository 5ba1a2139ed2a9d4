"""The forward kernels of cross-entropy: one read of the logits gives losses and LSE.

Narrow rows are held whole, several a program. A wide row has a program, and an online softmax
(Milakov & Gimelshein 2018) over its blocks.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that LOWEST - LOWEST is 0
INTEGERS = (
    "rows_stride", "grad_stride", "losses_stride", "n_rows", "blocks", "classes", "ignore_index",
)  # fmt: skip


@triton.jit
def exponential(x):
    """exp(x) as tl.exp() computes it, but below 2^-126 it is 0: half as many instructions."""
    return tl.exp2(x * LOG2E)


@triton.jit
def row_targets(
    target_ptr, weight_ptr, rows, inside, classes, ignore_index, HAS_WEIGHT: tl.constexpr
):  # fmt: skip
    """For each row: target, is it ignored, is it bad, and its weight (0 where either)."""
    target = tl.load(target_ptr + rows, mask=inside, other=0).to(tl.int64)
    ignored = target == ignore_index
    outside = (target < 0) | (target >= classes)
    counted = inside & (ignored == 0) & (outside == 0)
    row_weight = tl.where(counted, 1.0, 0.0)
    if HAS_WEIGHT:
        row_weight = tl.load(weight_ptr + target, mask=counted, other=0.0).to(tl.float32)
    return target, ignored, outside & (ignored == 0), row_weight


@triton.jit
def _target_logit(logits_ptr, offsets, target, ignored, bad, inside):
    """The logit of each row's target, and what to subtract from logits before they are summed."""
    counted = inside & (ignored == 0) & (bad == 0)
    logit = tl.load(logits_ptr + offsets + target, mask=counted, other=0.0).to(tl.float32)
    return logit, tl.where(logit == float("-inf"), 0.0, logit)


@triton.jit
def sum_of_weights(weight_sum_ptr, classes, HAS_WEIGHT: tl.constexpr):
    return tl.load(weight_sum_ptr) if HAS_WEIGHT else classes.to(tl.float32)


@triton.jit
def _store_loss(
    losses_ptr, row_weights_ptr, lse_ptr, weight_sum_ptr,
    rows, inside, ignored, bad, row_weight, logit, centre,
    peak, log_total,  # LSE = peak + log_total; apart, for the loss to be exact where LSE is large
    excess,  # sum_j w_j (x_j - centre), if SMOOTHING
    classes, share, uniform,
    HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    loss = share * row_weight * (peak - logit + log_total)
    if SMOOTHING:
        # Of differences: sums of large logits would cancel.
        weight_sum = sum_of_weights(weight_sum_ptr, classes, HAS_WEIGHT)
        loss += uniform * (weight_sum * (peak - centre + log_total) - excess)
    loss = tl.where(bad, float("nan"), tl.where(ignored, 0.0, loss))
    tl.store(losses_ptr + rows, loss, mask=inside)
    tl.store(row_weights_ptr + rows, row_weight, mask=inside)
    tl.store(lse_ptr + rows, peak + log_total, mask=inside)


@triton.jit(do_not_specialize=INTEGERS)
def cross_entropy_narrow_fwd_kernel(
    logits_ptr,  # (n_rows, classes), rows rows_stride apart
    target_ptr,  # (n_rows,) int64 or int32
    weight_ptr,  # (classes,), if HAS_WEIGHT
    weight_sum_ptr,  # float32, if HAS_WEIGHT and SMOOTHING
    losses_ptr, row_weights_ptr, lse_ptr,  # (n_rows,) float32
    rows_stride: tl.int64,
    n_rows: tl.int64,
    classes: tl.int32,
    ignore_index: tl.int64,
    share,  # 1 - smoothing
    uniform,  # smoothing / classes
    HAS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    UNIT: tl.constexpr,  # classes and rows_stride are multiples of it
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # >= classes
):  # fmt: skip
    classes = classes // UNIT * UNIT
    rows_stride = rows_stride // UNIT * UNIT
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    in_rows, in_columns = rows < n_rows, columns < classes
    inside = in_rows[:, None] & in_columns[None, :]
    offsets = rows * rows_stride
    x = tl.load(logits_ptr + offsets[:, None] + columns, mask=inside, other=float("-inf"))
    x = x.to(tl.float32)
    target, ignored, bad, row_weight = row_targets(
        target_ptr, weight_ptr, rows, in_rows, classes, ignore_index, HAS_WEIGHT
    )
    logit, centre = _target_logit(logits_ptr, offsets, target, ignored, bad, in_rows)
    peak = tl.maximum(tl.max(x, 1), LOWEST)
    total = tl.sum(exponential(x - peak[:, None]), 1)
    log_total = tl.log(tl.where(in_rows, total, 1.0))
    excess = centre
    if SMOOTHING:
        terms = x - centre[:, None]
        if HAS_WEIGHT:
            w = tl.load(weight_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
            terms *= w[None, :]
        excess = tl.sum(tl.where(inside, terms, 0.0), 1)
    _store_loss(
        losses_ptr, row_weights_ptr, lse_ptr, weight_sum_ptr,
        rows, in_rows, ignored, bad, row_weight, logit, centre, peak, log_total, excess,
        classes, share, uniform, HAS_WEIGHT, SMOOTHING,
    )  # fmt: skip


@triton.jit
def _fold(
    peak, total, excess,  # (LANES,): maximum, sum of exponentials, sum of weighted differences
    row_ptr, weight_ptr, offsets, shift, classes, centre,
    HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes a block of a row, (LANES, UNIT), into the online softmax."""
    columns = offsets - shift
    if MASKED:
        inside = columns < classes
        if not ALIGNED:
            inside &= columns >= 0
        x = tl.load(row_ptr + offsets, mask=inside, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(row_ptr + offsets).to(tl.float32)
    higher = tl.maximum(peak, tl.max(x, 1))
    total = total * exponential(peak - higher) + tl.sum(exponential(x - higher[:, None]), 1)
    if SMOOTHING:
        terms = x - centre
        if MASKED:
            terms = tl.where(inside, terms, 0.0)
        if HAS_WEIGHT:
            if MASKED:
                w = tl.load(weight_ptr + columns, mask=inside, other=0.0)
            else:
                w = tl.load(weight_ptr + columns)
            terms *= w.to(tl.float32)
        excess += tl.sum(terms, 1)
    return higher, total, excess


@triton.jit(do_not_specialize=INTEGERS)
def cross_entropy_wide_fwd_kernel(
    logits_ptr,  # (n_rows, classes), rows rows_stride apart
    target_ptr,  # (n_rows,) int64 or int32
    weight_ptr,  # (classes,), if HAS_WEIGHT
    weight_sum_ptr,  # float32, if HAS_WEIGHT and SMOOTHING
    losses_ptr, row_weights_ptr, lse_ptr,  # (n_rows,) float32
    rows_stride: tl.int64,
    classes: tl.int32,
    ignore_index: tl.int64,
    share,  # 1 - smoothing
    uniform,  # smoothing / classes
    HAS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ALIGNED: tl.constexpr,  # classes and rows_stride are multiples of UNIT
    UNIT: tl.constexpr,  # elements of a 16-byte access
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.arange(0, 1)
    inside = rows >= 0
    # The row is [shift, end) of what starts at the boundary `start`.
    start = row * rows_stride
    shift = 0
    if ALIGNED:
        classes = classes // UNIT * UNIT
    else:
        shift = (start % UNIT).to(tl.int32)
    start = start // UNIT * UNIT
    end = shift + classes
    target, ignored, bad, row_weight = row_targets(
        target_ptr, weight_ptr, rows, inside, classes, ignore_index, HAS_WEIGHT
    )
    logit, centre = _target_logit(logits_ptr, rows * rows_stride, target, ignored, bad, inside)
    shared_centre = tl.sum(centre)

    # Each thread keeps the maximum and the sum of what it reads: no exchange until the end, for
    # one more exponential in UNIT.
    LANES: tl.constexpr = COLUMNS // UNIT
    offsets = tl.arange(0, LANES)[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    peak = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    excess = tl.zeros([LANES], tl.float32)
    peak, total, excess = _fold(
        peak, total, excess, logits_ptr + start, weight_ptr, offsets, shift, classes,
        shared_centre, HAS_WEIGHT, SMOOTHING, ALIGNED, True,
    )  # fmt: skip
    for block_start in range(COLUMNS, end - COLUMNS + 1, COLUMNS):
        peak, total, excess = _fold(
            peak, total, excess, logits_ptr + start, weight_ptr, block_start + offsets, shift,
            classes, shared_centre, HAS_WEIGHT, SMOOTHING, ALIGNED, False,
        )  # fmt: skip
    last = end // COLUMNS * COLUMNS
    if (last > 0) & (last < end):
        peak, total, excess = _fold(
            peak, total, excess, logits_ptr + start, weight_ptr, last + offsets, shift, classes,
            shared_centre, HAS_WEIGHT, SMOOTHING, ALIGNED, True,
        )  # fmt: skip
    highest = tl.max(peak, 0)
    log_total = tl.log(tl.sum(total * exponential(peak - highest), 0))
    _store_loss(
        losses_ptr, row_weights_ptr, lse_ptr, weight_sum_ptr,
        rows, inside, ignored, bad, row_weight, logit, centre, highest, log_total,
        tl.sum(excess, 0), classes, share, uniform, HAS_WEIGHT, SMOOTHING,
    )  # fmt: skip
