"""Linear layers of a few rows, as decoding has them: one token of each sequence."""

import torch
from torch import Tensor, nn
from torch.nn import functional

# Up to so many rows, and from so many weights on, the other ways are faster (2 cores, MKL): for a
# layer of GPT-2 small 2 to 4 times. Smaller weights are in a cache anyhow.
_MOST_ROWS = 4
_LEAST_WEIGHTS = 2**18


def linear(x: Tensor, weight: Tensor, bias: "Tensor | None" = None) -> Tensor:
    """``torch.nn.functional.linear``, on a CPU and without gradients as fast as weights are read.

    What a product of few rows costs is reading the weights, for which torch's own takes one thread
    where there is one row, and is slower than the memory where there are a few.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).

    Returns:
        (..., N), contiguous.
    """
    if not _few_rows(x, weight):
        return functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])  # (R, K)
    y = _of_one_row(rows[0], weight)[None] if len(rows) == 1 else (weight @ rows.t()).t()  # (R, N)
    y = y.contiguous()
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], -1)


def linear_layer(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x) by linear(), unless the layer is of another kind or its call has hooks."""
    if (
        type(layer).forward is not nn.Linear.forward
        or layer._forward_hooks
        or layer._forward_pre_hooks
    ):
        return layer(x)
    return linear(x, layer.weight, layer.bias)


def _few_rows(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.numel() >= _LEAST_WEIGHTS
        and 0 < x.numel() <= _MOST_ROWS * x.shape[-1]
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
    )


def _of_one_row(row: Tensor, weight: Tensor) -> Tensor:
    """(K,), (N, K) -> (N,); each thread takes a part of the weights."""
    threads = torch.get_num_threads()
    part = len(weight) // threads
    parts = weight[: threads * part].view(threads, part, -1)
    # As the transpose of a row: MKL takes row[:, None], of other strides, a slower way.
    y = torch.bmm(parts, row[None].t().expand(threads, -1, 1)).flatten()
    rest = weight[threads * part :]
    return torch.cat((y, torch.mv(rest, row))) if len(rest) else y
