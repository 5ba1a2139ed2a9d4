"""Dropout whose mask is a pure function of the seed and the position, never a tensor in memory.

Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting" (2014).
"""

from torch import Tensor

from fusedformer.kernels import dispatch, rng
from fusedformer.kernels.checks import check_dropout_p, check_floating
from fusedformer.kernels.function import Function, once_differentiable, run

# --- Registered ops -------------------------------------------------------------------------------


def _run(tensor: Tensor, seed: Tensor, p: float, backend: str, name: str) -> Tensor:
    if tensor.numel() == 0 or p == 1:
        return tensor.new_zeros(tensor.shape)
    module = dispatch.pick("dropout", backend, (tensor, seed, p))
    return getattr(module, name)(tensor, seed, p)


def _fwd(x, seed, p, backend):
    return _run(x, seed, p, backend, "dropout_fwd")


def _bwd(grad_out, seed, p, backend):
    return _run(grad_out, seed, p, backend, "dropout_bwd")


def _fake(tensor, seed, p, backend):
    return tensor.new_empty(tensor.shape)


_ARGS = "Tensor seed, float p, str backend"
_call_fwd = dispatch.define(
    "dropout", "dropout", f"dropout_fwd(Tensor x, {_ARGS}) -> Tensor", _fwd, _fake
)
_call_bwd = dispatch.define(
    "dropout", "dropout", f"dropout_bwd(Tensor grad_out, {_ARGS}) -> Tensor", _bwd, _fake
)


class _Dropout(Function):
    differentiable = 1

    # Named one by one: where nothing needs a gradient, Dynamo cannot trace a forward(*args).
    @staticmethod
    def forward(x, seed, p, backend):
        return _call_fwd(x, seed, p, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, seed, *ctx.options = inputs
        ctx.save_for_backward(seed)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        if grad_out is None:
            return (None,) * 4
        (seed,) = ctx.saved_tensors
        grad_x = _call_bwd(grad_out, seed, *ctx.options)
        return grad_x, None, None, None


# --- Public function ------------------------------------------------------------------------------


def dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: "int | Tensor | None" = None,
    backend: "str | None" = None,
) -> Tensor:
    """Sets elements to zero with probability p and scales the others by 1 / (1 - p).

    p is met to 2^-32. An element's fate depends on the seed, its column (index in the last
    dimension) and its row (all other dimensions flattened) alone. The backward replays it from the
    seed, the only thing saved.

    Args:
        x: any shape and strides; float32, float16, bfloat16 (float64 on the reference backend).
        p: probability in [0, 1] that an element is dropped.
        training: False returns x, as at inference.
        seed: of the mask, an int or a 0-d int64 tensor; drawn from torch's generator when None. The
            shards of a DTensor each draw a mask of their own, not their part of the whole's.
        backend: "reference", "triton", "cpu"; None chooses. One that is named runs or raises.

    Returns:
        A contiguous tensor of x's shape and dtype; x itself where nothing is dropped (p = 0, or
        training False). Dropped elements are 0 whatever they held, NaN included.

    Raises:
        ValueError, TypeError: an argument is not as above.
        RuntimeError: the backend named cannot run this call; the message says why.
    """
    check_floating("dropout", "x", x)
    check_dropout_p("dropout", p, "p")
    backend = dispatch.checked("dropout", backend)
    if p == 0 or not training:
        return x
    return run(_Dropout, x, rng.as_seed("dropout", seed, x.device), float(p), backend)
