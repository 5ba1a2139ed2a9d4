"""The way from a public function into autograd, as short as it can be."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedformer.kernels import dispatch


class Function(torch.autograd.Function):
    """What the Functions of all ops share."""

    differentiable: int  # how many arguments, the first ones, may get a gradient

    # vmap maps forward and backward, which call ops that have no batching rule: these are then
    # called once for each sample. Right, whatever is batched, if not fast.
    generate_vmap_rule = True


def run(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)``, all arguments by position.

    Function.apply() binds its arguments to the signature of forward() for the sake of defaults,
    which takes longer than a small call itself. Nothing here has defaults, so the C++ function
    beneath is called; and where nothing needs a gradient, forward() alone.

    The first argument is a tensor. If it is a DTensor, each device runs its part.
    """
    if type(args[0]) is not Tensor and hasattr(args[0], "device_mesh"):
        from fusedformer.kernels import dtensor  # only where torch.distributed is in use

        return dtensor.run(function, args)
    if torch.compiler.is_compiling():
        return function.apply(*_distinct(args))
    if forward_ad._current_level >= 0:
        # Past apply() a tangent would be lost without a word. A jvp() that raises would say why in
        # the first place, but Dynamo does not trace a Function that has one.
        try:
            return function.apply(*args)
        except NotImplementedError:
            raise NotImplementedError(
                "fusedformer has no forward-mode derivatives (torch.func.jvp, jacfwd, hessian, "
                "torch.autograd.forward_ad): use reverse mode (torch.func.vjp, jacrev), or "
                "PyTorch's own function"
            ) from None
    if dispatch.transforms_active():
        return function.apply(*args)
    if wants_gradient(*args[: function.differentiable]):
        return apply(function, *args)
    return function.forward(*args)


def wants_gradient(*tensors: "Tensor | None") -> bool:
    """Whether a call with these tensors has to be recorded for a backward."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """The C++ function beneath ``function.apply(*args)``, which has no types."""
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


class _Context:
    """A backward's context, whose saved tensors are unpacked once: checkpointing allows no more."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Once(torch.autograd.Function):
    """A backward's results, with all that they depend on; no gradient goes through."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Any) -> Any:
        # Views of torch's would not let their user write into them.
        alike = torch.ops.aten._unsafe_view
        return tuple(None if x is None else alike(x, x.shape) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "fusedformer's ops can be differentiated once, not twice (@once_differentiable): for "
            "second derivatives use PyTorch's own function"
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose results raise where a gradient of them is wanted.

    torch's decorator does not see to that where the upstream gradient needs none, as that of a
    loss: its results then count as constants, and a Hessian silently lacks them. Its error leads to
    no input, either, so that torch.autograd.grad() goes past it. Compilers know torch's alone.
    """
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def run_backward(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        if torch.compiler.is_compiling():
            return guarded(ctx, *grads)
        context = _Context(ctx)
        with torch.no_grad():
            found = backward(context, *grads)
        found = found if isinstance(found, tuple) else (found,)
        return _Once.apply(len(found), *found, *grads, *context.saved_tensors)

    return run_backward


def _distinct(args: tuple) -> list[Any]:
    """The arguments, a repeated tensor as a view: Dynamo takes none twice into a Function."""
    seen: list[Any] = []
    for arg in args:
        again = isinstance(arg, Tensor) and any(arg is other for other in seen)
        seen.append(arg.view_as(arg) if again else arg)
    return seen
