"""Cross-entropy of logits with class indices: label smoothing, class weights, ignored targets.

The forward keeps LSE = log sum_j exp(x_j) of each row, never a softmax; the backward makes
softmax(x)_j = exp(x_j - LSE) again and writes the gradient in one pass. Label smoothing is Szegedy
et al., "Rethinking the Inception Architecture for Computer Vision" (2016), section 7.
"""

import torch
from torch import Tensor

from fusedformer.kernels import dispatch
from fusedformer.kernels.checks import (
    autocast_is_on,
    check_floating,
    check_strided,
    check_tensor,
    is_integer,
    is_number,
    shape,
)
from fusedformer.kernels.function import Function, once_differentiable, run

REDUCTIONS = ("none", "mean", "sum")


# --- Registered ops -------------------------------------------------------------------------------

# logits (..., V) and target (...): losses, rows' weights and LSE are (...) float32.
_ARGS = "Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing"


def check_target_values(name: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """Raises ValueError unless each target is a class or ignore_index; looks on a CPU only.

    On a GPU, reading values back would synchronise; there a bad target gives a NaN.
    """
    if not target.is_cpu or target.numel() == 0:
        return
    low, high = (int(bound) for bound in target.aminmax())
    if low >= 0 and high < classes:
        return
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bad.any():
        raise ValueError(
            f"{name}: target must be from 0 to {classes - 1} (the number of classes is {classes}) "
            f"or ignore_index ({ignore_index}); got {int(target[bad][0])}"
        )


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """Of losses, LSE and sums, whatever the dtype of what they are made from."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _fwd(logits, target, weight, ignore_index, label_smoothing, backend):
    check_target_values("cross_entropy", target, logits.shape[-1], ignore_index)
    if target.numel() == 0:
        return _fwd_fake(logits, target)
    args = (logits, target, weight, ignore_index, label_smoothing)
    return dispatch.pick("cross_entropy", backend, args).cross_entropy_fwd(*args)


def _fwd_fake(logits, target, *args):
    dtype = statistics_dtype(logits)
    return tuple(target.new_empty(target.shape, dtype=dtype) for _ in range(3))


def _bwd(grad_losses, lse, logits, target, weight, ignore_index, label_smoothing, backend):
    if target.numel() == 0:
        return logits.new_empty(logits.shape)
    args = (logits, target, weight, ignore_index, label_smoothing)
    module = dispatch.pick("cross_entropy", backend, args)
    return module.cross_entropy_bwd(grad_losses, lse, *args)


def _bwd_fake(grad_losses, lse, logits, *args):
    return logits.new_empty(logits.shape)


_call_fwd = dispatch.define(
    "cross_entropy",
    "cross_entropy",
    f"cross_entropy_fwd({_ARGS}, str backend) -> (Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
_call_bwd = dispatch.define(
    "cross_entropy",
    "cross_entropy",
    f"cross_entropy_bwd(Tensor grad_losses, Tensor lse, {_ARGS}, str backend) -> Tensor",
    _bwd,
    _bwd_fake,
)


class _CrossEntropy(Function):
    """Losses, rows' weights and LSE; gradients flow through the losses alone."""

    differentiable = 1

    @staticmethod
    def forward(logits, target, weight, ignore_index, label_smoothing, backend):
        return _call_fwd(logits, target, weight, ignore_index, label_smoothing, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, weight, *ctx.options = inputs
        _, row_weights, lse = output
        ctx.mark_non_differentiable(row_weights, lse)
        ctx.save_for_backward(lse, logits, target, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses, _grad_row_weights, _grad_lse):
        if grad_losses is None:
            return (None,) * 6
        grad = _call_bwd(grad_losses, *ctx.saved_tensors, *ctx.options)
        return grad, None, None, None, None, None


# --- Public function ------------------------------------------------------------------------------


def check_loss_options(
    name: str,
    target: Tensor,
    weight: "Tensor | None",
    classes: int,
    ignore_index: object,
    reduction: object,
    label_smoothing: object,
    like: Tensor,
) -> None:
    """Checks what both losses share: all but the shapes of input and target.

    Raises:
        ValueError, TypeError: an argument is not as cross_entropy() says.
    """
    check_tensor(name, "target", target, like=like, like_label="input", same_dtype=False)
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{name}: target must be class indices, int64 or int32 (class probabilities are not "
            f"supported); got {target.dtype}"
        )
    if classes == 0:
        raise ValueError(f"{name}: input must have at least one class; got {shape(like)}")
    if weight is not None:
        check_floating(name, "weight", weight)
        check_tensor(name, "weight", weight, like=like, like_label="input", same_dtype=False)
        if tuple(weight.shape) != (classes,):
            raise ValueError(
                f"{name}: weight must be ({classes},), one for each class; got {shape(weight)}"
            )
        if weight.dtype == torch.float64 and like.dtype != torch.float64:
            raise TypeError(f"{name}: a float64 weight needs a float64 input; got {like.dtype}")
        if weight.requires_grad:
            raise ValueError(f"{name}: weight must not require a gradient: it gets none")
    if not is_integer(ignore_index):
        raise TypeError(f"{name}: ignore_index must be an int; got {ignore_index!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{name}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}"
        )
    if not is_number(label_smoothing):
        raise TypeError(
            f"{name}: label_smoothing must be a number from 0 to 1; got {label_smoothing!r}"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must be from 0 to 1; got {label_smoothing}")


def loss_dtype(tensor: Tensor) -> torch.dtype:
    """Of the result: the input's, as torch's; float32 under autocast, whose list has the losses."""
    if tensor.dtype != torch.float64 and autocast_is_on(tensor.device.type):
        return torch.float32
    return tensor.dtype


def _classes_last(input: Tensor, target: Tensor) -> Tensor:
    """The logits with their classes in the last dimension; see cross_entropy()."""
    name = "cross_entropy"
    if input.dim() == 0:
        raise ValueError(f"{name}: input must have a dimension of classes; got a 0-d tensor")
    if not isinstance(target, Tensor) or target.is_nested:
        check_strided(name, "target", target)
    last = target.shape == input.shape[:-1]
    if input.dim() <= 2:
        if not last:
            raise ValueError(
                f"{name}: target must be {tuple(input.shape[:-1])} for an input of "
                f"{shape(input)}; got {shape(target)}"
            )
        return input
    second = target.shape == input.shape[:1] + input.shape[2:]
    if last and second:
        raise ValueError(
            f"{name}: with input {shape(input)} and target {shape(target)} the classes may be in "
            "dimension 1 or in the last; flatten them: "
            "cross_entropy(input.flatten(0, -2), target.flatten()) if they are in the last"
        )
    if not last and not second:
        raise ValueError(
            f"{name}: target must be {tuple(input.shape[:-1])} (classes in the last dimension of "
            f"input) or {tuple(input.shape[:1] + input.shape[2:])} (in dimension 1) for an input "
            f"of {shape(input)}; got {shape(target)}"
        )
    return input if last else input.movedim(1, -1)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: "Tensor | None" = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    backend: "str | None" = None,
) -> Tensor:
    """``torch.nn.functional.cross_entropy`` of class indices, one read of the logits.

    With w the class weights and e the label smoothing, a row x with target t has the loss
    (1 - e) w_t (LSE(x) - x_t) + e / V sum_j w_j (LSE(x) - x_j), computed in float32. The backward
    reads the logits once more and writes their gradient; nothing of their size is saved or
    overwritten.

    Args:
        input: logits, float32, float16 or bfloat16 (float64 on the reference backend only), any
            strides. (V,), (N, V), or more dimensions: (..., V) with a target (...), or torch's
            (N, V, d1, ...) with a target (N, d1, ...), which costs a copy. Where sizes allow both
            readings ((N, V, V) with (N, V)) it raises.
        target: int64 or int32 class indices. One that is neither ignore_index nor from 0 to V - 1
            raises on a CPU; on a GPU, where looking would synchronise, its row's loss and gradient
            are NaN.
        weight: (V,), of each class, any of these dtypes; None means 1. No gradient.
        ignore_index: a target that contributes neither loss nor gradient.
        reduction: "none", "sum", or "mean": the sum divided by that of w_t over the rows that
            are not ignored (NaN if there are none, as torch's; the gradient is then 0).
        label_smoothing: e, from 0 to 1.
        backend: "reference", "triton", "cpu"; None chooses. One that is named runs or raises.

    Returns:
        A scalar, or of target's shape if reduction is "none"; of input's dtype (float32 under
        autocast, as torch's).

    Raises:
        ValueError, TypeError: an argument is not as above.
        RuntimeError: the backend named cannot run this call; the message says why.
    """
    name = "cross_entropy"
    check_floating(name, "input", input)
    logits = _classes_last(input, target)
    check_loss_options(
        name, target, weight, logits.shape[-1], ignore_index, reduction, label_smoothing, input
    )
    losses, row_weights, _ = run(
        _CrossEntropy,
        logits, target, weight, int(ignore_index), float(label_smoothing),
        dispatch.checked(name, backend),
    )  # fmt: skip
    if reduction == "mean":
        losses = losses.sum() / row_weights.sum()
    elif reduction == "sum":
        losses = losses.sum()
    return losses.to(loss_dtype(input))
