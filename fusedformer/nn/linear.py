"""Linear layers: in decoding of few rows, one token of each sequence; in training of many."""

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as torch_module

from fusedformer.kernels.linear import linear_of_few_rows
from fusedformer.kernels.linear_training import linear_in_training

# Private; where it is no more, there may always be a hook.
_any_global_hook = getattr(torch_module, "_has_any_global_hook", lambda: True)


def linear(x: Tensor, weight: Tensor, bias: "Tensor | None" = None) -> Tensor:
    """``torch.nn.functional.linear``, on a CPU in faster ways.

    Few rows without gradients go through a kernel of our own, float32 in training through oneDNN
    where torch's choice is slower.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).

    Returns:
        (..., N).
    """
    for faster in (linear_of_few_rows, linear_in_training):
        y = faster(x, weight, bias)
        if y is not None:
            return y
    return functional.linear(x, weight, bias)


def is_plain(layer: nn.Module) -> bool:
    """Whether a call of the layer is functional.linear() of its parameters, and nobody looks on."""
    return (
        type(layer).forward is nn.Linear.forward
        and "forward" not in layer.__dict__  # as tools that wrap a layer put there
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
        and not _any_global_hook()
    )


def linear_layer(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x) by linear(), unless the layer is of another kind or its call has hooks."""
    return linear(x, layer.weight, layer.bias) if is_plain(layer) else layer(x)
