"""The way from a public function into autograd, as short as it can be."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Private, but what Function.apply() itself asks; where torch has it no more, the long way is taken.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


class Function(torch.autograd.Function):
    """What the Functions of all ops share."""

    # vmap maps forward and backward, which call ops that have no batching rule: these are then
    # called once for each sample. Right, whatever is batched, if not fast.
    generate_vmap_rule = True


def run(function: type[torch.autograd.Function], *args: Any) -> Any:
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
        return function.apply(*args)
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
    if _transforms_active():
        return function.apply(*args)
    # What lies beneath Function.apply() has no types.
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
    return function.forward(*args)
