"""The way from a public function into autograd, as short as it can be."""

from typing import Any

import torch
from torch import Tensor

# Private, but what Function.apply() itself asks; where torch has it no more, the long way is taken.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def run(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, all arguments by position.

    Function.apply() binds its arguments to the signature of forward() for the sake of defaults,
    which takes longer than a small call itself. Nothing here has defaults, so the C++ function
    beneath is called; and where nothing needs a gradient, forward() alone.
    """
    if torch.compiler.is_compiling() or _transforms_active():
        return function.apply(*args)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
    return function.forward(*args)
