"""Cross-entropy of a linear layer's outputs, without ever holding all of those logits.

Tokens are taken in chunks: a matmul (torch's own) makes a chunk's logits, the kernels of
cross_entropy turn them into losses and, in the same memory, into their gradient, and two matmuls
carry that on to input and weight (Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM
Training", 2024, has this scheme as FusedLinearCrossEntropy).

- Gradients are made in the forward, when one is wanted: a backward that made the logits again
  would cost a fourth matmul, a third of the whole. They are those of the *sum* of the losses, and
  multiplied in the backward by what comes from above (and by 1 / divisor for a mean): one scalar,
  whatever it is, applied in float32. Small gradients thus do not vanish in float16 before a loss
  scale reaches them, and a second backward through a retained graph finds them untouched.
- With reduction="none" what comes from above is a vector, unknown in the forward. Then the
  backward does make the logits again, from the LSE that was saved.
- The weight's gradient is summed over chunks, and kept, in float32 (summed in bfloat16, the chunks
  lose what each of them adds; known to diverge), and rounded once to the weight's dtype.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fusedformer.kernels import dispatch
from fusedformer.kernels.checks import autocast, check_floating, check_tensor, shape
from fusedformer.kernels.cross_entropy import (
    check_loss_options,
    check_target_values,
    loss_dtype,
    statistics_dtype,
)
from fusedformer.kernels.function import Function, once_differentiable, run
from fusedformer.kernels.linear_training import faster, product

# --- Chunks ---------------------------------------------------------------------------------------

# A chunk's logits are the one large buffer beside the weight's float32 gradient. Each chunk reads
# and writes that gradient once: 8 bytes an element, against 6 flops an element and token. At 4 TB/s
# and 700 TFLOP/s that is 230 / tokens of the matmuls' time at most, hence chunks no shorter than
# 2048 tokens where memory allows (16 of them at 32k tokens).
CHUNK_TOKENS = 2048
CHUNK_BYTES = 2**30


def chunk_tokens(tokens: int, classes: int, itemsize: int) -> int:
    """Tokens a chunk: at most CHUNK_TOKENS, at most CHUNK_BYTES of logits, all about the same."""
    most = max(1, min(CHUNK_TOKENS, CHUNK_BYTES // (classes * itemsize)))
    chunks = -(-tokens // most)
    return -(-tokens // chunks)


def _chunks(
    x: Tensor, linear_weight: Tensor, linear_bias: "Tensor | None"
) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk's place among the tokens, and its logits.

    These are the same memory for all of them, or fresh: so that no two chunks' logits are there at
    once, the caller lets go of them before it asks for the next.
    """
    tokens, classes = x.shape[0], linear_weight.shape[0]
    length = chunk_tokens(tokens, classes, x.element_size())
    # Rows start on 128 bytes whatever the number of classes, for matmul and kernels alike.
    pitch = -(-classes // 64) * 64
    by_product = faster(x[:length], linear_weight)
    buffer = x.new_empty(0 if by_product else length, pitch)
    for start in range(0, tokens, length):
        part = slice(start, min(start + length, tokens))
        if by_product:
            yield part, product(x[part], linear_weight, linear_bias)
            continue
        logits = buffer[: part.stop - start, :classes]
        if linear_bias is None:
            torch.mm(x[part], linear_weight.t(), out=logits)
        else:
            torch.addmm(linear_bias, x[part], linear_weight.t(), out=logits)
        yield part, logits


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, where total is float32 (float64) and a and b may have fewer bits.

    Args:
        first: nothing has been added yet, and total holds anything; on a CPU alone.
    """
    if a.device.type == "cuda" and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif a.dtype == torch.bfloat16:
        # No such matmul on a CPU. A chunk's product is rounded as a linear layer's gradient is; in
        # float32 it would take four times as long.
        product = torch.mm(a, b)
        total.copy_(product) if first else total.add_(product)
    else:
        # What is rounded to float16 may overflow: widened instead, exactly. With a beta of 0, what
        # total holds is not read.
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=0 if first else 1)


class _Gradients:
    """The gradients of input, weight and bias that are wanted, filled in chunk by chunk.

    The input's has its dtype (each row is written once); the others are sums, kept in float32.
    """

    def __init__(self, x: Tensor, linear_weight: Tensor, wanted: "list[bool]") -> None:
        dtype = statistics_dtype(x)
        classes = linear_weight.shape[0]
        self.x, self.linear_weight, self.wanted = x, linear_weight, wanted
        self.input = x.new_empty(x.shape if wanted[0] else 0)
        self.weight = x.new_empty(linear_weight.shape if wanted[1] else 0, dtype=dtype)
        # On a CPU the first chunk's product is written, which saves a pass over all of it.
        self.empty = x.device.type == "cpu" and x.shape[0] > 0
        if not self.empty:
            self.weight.zero_()
        self.bias = x.new_zeros(classes if wanted[2] else 0, dtype=dtype)

    def add(self, part: slice, grad_logits: Tensor) -> None:
        if self.wanted[0] and faster(grad_logits, self.linear_weight):
            self.input[part] = product(grad_logits, self.linear_weight.t())
        elif self.wanted[0]:
            torch.mm(grad_logits, self.linear_weight, out=self.input[part])
        if self.wanted[1]:
            _add_product(self.weight, grad_logits.t(), self.x[part], self.empty)
            self.empty = False
        if self.wanted[2]:
            self.bias += grad_logits.sum(0, dtype=self.bias.dtype)


# --- Registered ops -------------------------------------------------------------------------------

_ARGS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
    "int ignore_index, float label_smoothing, bool[] wanted"
)


@torch.no_grad()  # an exported program calls the op with the parameters themselves
def _fwd(
    input, linear_weight, linear_bias, target, weight, ignore_index, smoothing, wanted, backend
):  # fmt: skip
    """Losses, rows' weights, LSE, and what is wanted of the gradients of the losses' sum."""
    check_target_values("linear_cross_entropy", target, linear_weight.shape[0], ignore_index)
    x, targets = input.reshape(target.numel(), input.shape[-1]), target.reshape(-1)
    gradients = _Gradients(x, linear_weight, wanted)
    losses, row_weights, lse = (
        x.new_empty(x.shape[0], dtype=statistics_dtype(x)) for _ in range(3)
    )  # fmt: skip
    one = losses.new_ones(())
    if target.numel() > 0:
        for part, logits in _chunks(x, linear_weight, linear_bias):
            args = (logits, targets[part], weight, ignore_index, smoothing)
            module = dispatch.pick("cross_entropy", backend, args)
            results = module.cross_entropy_fwd(*args)
            for whole, result in zip((losses, row_weights, lse), results, strict=True):
                whole[part] = result
            if any(wanted):
                ones = one.expand(logits.shape[0])
                gradients.add(part, module.cross_entropy_bwd(ones, results[2], *args, True))
            del logits, args
    grad_input = gradients.input.view(input.shape) if wanted[0] else gradients.input
    return (
        losses.view(target.shape), row_weights.view(target.shape), lse.view(target.shape),
        grad_input, gradients.weight, gradients.bias,
    )  # fmt: skip


def _fwd_fake(
    input, linear_weight, linear_bias, target, weight, ignore_index, smoothing, wanted, backend
):  # fmt: skip
    dtype = statistics_dtype(input)
    return (
        *(input.new_empty(target.shape, dtype=dtype) for _ in range(3)),
        input.new_empty(input.shape if wanted[0] else 0),
        input.new_empty(linear_weight.shape if wanted[1] else 0, dtype=dtype),
        input.new_empty(linear_weight.shape[0] if wanted[2] else 0, dtype=dtype),
    )


@torch.no_grad()
def _bwd(
    grad_losses, lse,
    input, linear_weight, linear_bias, target, weight, ignore_index, smoothing, wanted, backend
):  # fmt: skip
    """The gradients, each row of the losses with its own factor: the logits are made again."""
    x, targets = input.reshape(target.numel(), input.shape[-1]), target.reshape(-1)
    gradients = _Gradients(x, linear_weight, wanted)
    grad_losses, lse = grad_losses.reshape(-1), lse.reshape(-1)
    if target.numel() > 0:
        for part, logits in _chunks(x, linear_weight, linear_bias):
            args = (logits, targets[part], weight, ignore_index, smoothing)
            module = dispatch.pick("cross_entropy", backend, args)
            gradients.add(part, module.cross_entropy_bwd(grad_losses[part], lse[part], *args, True))
            del logits, args
    grad_input = gradients.input.view(input.shape) if wanted[0] else gradients.input
    return grad_input, gradients.weight.to(x.dtype), gradients.bias.to(x.dtype)


def _bwd_fake(grad_losses, lse, input, linear_weight, *args):
    wanted = args[-2]
    return (
        input.new_empty(input.shape if wanted[0] else 0),
        input.new_empty(linear_weight.shape if wanted[1] else 0),
        input.new_empty(linear_weight.shape[0] if wanted[2] else 0),
    )


_CACHED = 2**17  # elements that _scaled() takes at a time


def _scaled(grad, scale, dtype):
    """grad * scale, computed in scale's float32 and rounded once, with nothing in between kept."""
    out = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    # A 0-d scale would be rounded to grad's dtype first.
    scale = scale.reshape((1,) * grad.dim())
    if grad.device.type != "cpu" or dtype == grad.dtype:
        return torch.mul(grad, scale, out=out)
    # A CPU writes all down before it rounds: of little at a time, that stays in its cache.
    rows = max(1, _CACHED // max(1, grad[:1].numel()))
    for one, place in zip(grad.split(rows), out.split(rows), strict=True):
        torch.mul(one, scale, out=place)
    return out


def _scaled_fake(grad, scale, dtype):
    return torch.empty(grad.shape, dtype=dtype, device=grad.device)


_OP = "linear_cross_entropy"
_call_fwd = dispatch.define(
    _OP,
    "cross_entropy",
    f"linear_cross_entropy_fwd({_ARGS}, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
_call_bwd = dispatch.define(
    _OP,
    "cross_entropy",
    f"linear_cross_entropy_bwd(Tensor grad_losses, Tensor lse, {_ARGS}, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)
_call_scaled = dispatch.define(
    _OP,
    "cross_entropy",
    "linear_cross_entropy_scaled(Tensor grad, Tensor scale, ScalarType dtype) -> Tensor",
    _scaled,
    _scaled_fake,
)


class _LinearCrossEntropy(Function):
    """The loss, then what the backward needs: divisor, LSE and the gradients of the sum."""

    differentiable = 3

    @staticmethod
    def forward(
        input, linear_weight, linear_bias, target, weight, ignore_index, label_smoothing,
        reduction, wanted, backend,
    ):  # fmt: skip
        in_forward = [False] * 3 if reduction == "none" else wanted
        losses, row_weights, *rest = _call_fwd(
            input, linear_weight, linear_bias, target, weight, ignore_index, label_smoothing,
            in_forward, backend,
        )  # fmt: skip
        if reduction == "none":
            return losses, row_weights, *rest
        divisor = row_weights.sum() if reduction == "mean" else row_weights.new_ones(())
        return losses.sum() / divisor, divisor, *rest

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.ignore_index, ctx.label_smoothing, ctx.reduction, ctx.wanted, ctx.backend = (
            inputs
        )
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        if ctx.reduction == "none":
            ctx.save_for_backward(output[2], *tensors)
        else:
            ctx.dtype = inputs[0].dtype
            # The inputs for once_differentiable() alone: the gradients depend on them.
            ctx.save_for_backward(output[1], *output[3:], *tensors[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_others):
        if grad_loss is None:
            return (None,) * 10
        if ctx.reduction == "none":
            lse, *tensors = ctx.saved_tensors
            grads = _call_bwd(
                grad_loss, lse, *tensors, ctx.ignore_index, ctx.label_smoothing, ctx.wanted,
                ctx.backend,
            )  # fmt: skip
        else:
            divisor, *grads = ctx.saved_tensors[:4]
            # Where every target is ignored, the loss is 0 / 0, but no gradient is.
            scale = torch.where(divisor == 0, 0.0, grad_loss / divisor)
            grads = [_call_scaled(grad, scale, ctx.dtype) for grad in grads]
        given = (grad if want else None for grad, want in zip(grads, ctx.wanted, strict=True))
        return (*given, *(None,) * 7)


# --- Public function ------------------------------------------------------------------------------


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: "Tensor | None" = None,
    weight: "Tensor | None" = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    backend: "str | None" = None,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)``, the logits in chunks.

    At no time are there logits of more than 2048 tokens, or over 1 GiB of them; beside them stands
    the weight's gradient in float32. Names are those of torch 2.13's
    ``torch.nn.functional.linear_cross_entropy``. The logits are rounded to input's dtype, as a
    linear layer's are. The matmuls are torch's, with its settings (TF32 for float32, say). For the
    reductions "mean" and "sum" gradients are made in the forward, for "none" in the backward, from
    logits made anew.

    Args:
        input: (..., H), float32, float16 or bfloat16 (float64 on the reference backend only), any
            strides. Under autocast it, linear_weight and linear_bias are cast, as a linear layer's.
        linear_weight: (V, H), dtype of input. Its gradient is summed over all tokens in float32.
        target: (...), int64 or int32 class indices; one that is neither ignore_index nor from 0 to
            V - 1 raises on a CPU, and gives NaN on a GPU.
        linear_bias: (V,), dtype of input.
        weight, ignore_index, reduction, label_smoothing: as cross_entropy().
        backend: of the cross-entropy kernels, "reference" or "triton"; None chooses. One that is
            named runs or raises.

    Returns:
        A scalar, or of target's shape if reduction is "none"; of input's dtype (float32 under
        autocast, as torch's).

    Raises:
        ValueError, TypeError: an argument is not as above.
        RuntimeError: the backend named cannot run this call; the message says why.
    """
    name = "linear_cross_entropy"
    check_floating(name, "input", input)
    dtype = loss_dtype(input)
    check_floating(name, "linear_weight", linear_weight)
    if linear_bias is not None:
        check_floating(name, "linear_bias", linear_bias)
        (linear_bias,) = autocast(name, linear_bias)
    input, linear_weight = autocast(name, input, linear_weight)
    check_tensor(name, "linear_weight", linear_weight, like=input, like_label="input")
    if input.dim() == 0 or linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"{name}: linear_weight must be (V, H) for an input (..., H); got "
            f"{shape(linear_weight)} for {shape(input)}"
        )
    classes = linear_weight.shape[0]
    if linear_bias is not None:
        check_tensor(name, "linear_bias", linear_bias, like=input, like_label="input")
        if tuple(linear_bias.shape) != (classes,):
            raise ValueError(
                f"{name}: linear_bias must be ({classes},), as linear_weight's first dimension; "
                f"got {shape(linear_bias)}"
            )
    check_loss_options(
        name, target, weight, classes, ignore_index, reduction, label_smoothing, input
    )
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"{name}: target must be {tuple(input.shape[:-1])} for an input of {shape(input)}; "
            f"got {shape(target)}"
        )
    trained = input, linear_weight, linear_bias
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in trained]
    loss, *_ = run(
        _LinearCrossEntropy,
        *trained, target, weight, int(ignore_index), float(label_smoothing), reduction, wanted,
        dispatch.checked(name, backend),
    )  # fmt: skip
    return loss.to(dtype)
