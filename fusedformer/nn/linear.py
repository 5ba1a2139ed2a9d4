"""Linear layers, which in decoding have but a few rows: one token of each sequence."""

from torch import Tensor, nn
from torch.nn import functional

from fusedformer.kernels.linear import linear_of_few_rows


def linear(x: Tensor, weight: Tensor, bias: "Tensor | None" = None) -> Tensor:
    """``torch.nn.functional.linear``; few rows, on a CPU and without gradients, by our own kernel.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).

    Returns:
        (..., N).
    """
    y = linear_of_few_rows(x, weight, bias)
    return functional.linear(x, weight, bias) if y is None else y


def linear_layer(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x) by linear(), unless the layer is of another kind or its call has hooks."""
    if (
        type(layer).forward is not nn.Linear.forward
        or layer._forward_hooks
        or layer._forward_pre_hooks
    ):
        return layer(x)
    return linear(x, layer.weight, layer.bias)
