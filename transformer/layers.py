"""The parts that models are made of, beside attention, dropout and norms, which fusedformer.nn has.

The models call kernels through these two alone. Shapes: B sequences, N tokens each, H heads of size
D, d_model = H D.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusedformer.kernels.activation import ACTIVATIONS, bias_activation
from fusedformer.kernels.checks import shape
from fusedformer.kernels.linear_cross_entropy import linear_cross_entropy
from fusedformer.nn.linear import is_plain, linear, linear_layer


def check_activation(name: str, activation: str) -> None:
    """Raises ValueError, in the name of the caller, where there is no such activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{name}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}"
        )


def linear_activation(
    layer: nn.Linear, x: Tensor, activation: str, dropout_p: float = 0.0
) -> Tensor:
    """dropout(activation(layer(x))); bias, activation and dropout are one kernel."""
    if activation == "relu" or not is_plain(layer):
        # ReLU's derivative jumps where the sum changes its sign, as a product that is rounded to
        # 16 bits before the bias is added can make it do.
        return bias_activation(linear_layer(layer, x), None, activation, dropout_p)
    product = linear(x, layer.weight)
    return bias_activation(product, layer.bias, activation, dropout_p)


def output_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: "Tensor | None" = None, **options: Any
) -> Tensor:
    """Cross-entropy of an output layer's logits, which are made in chunks and never kept.

    Args:
        hidden: (..., d_model).
        weight: (classes, d_model); an embedding's, where that is the output layer, too.
        labels: (...) int; -100 where nothing is to be predicted.
        bias: (classes,).
        options: of linear_cross_entropy(), such as label_smoothing and reduction.
    """
    return linear_cross_entropy(hidden, weight, labels, linear_bias=bias, **options)


class FeedForward(nn.Module):
    """linear2(dropout(activation(linear1(x)))), at each position by itself (section 3.3)."""

    def __init__(self, d_model: int, d_ff: int, activation: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_model, d_ff)
        self.linear2 = nn.Linear(d_ff, d_model)
        self.activation = activation
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        hidden = linear_activation(self.linear1, x, self.activation, p)  # (B, N, d_ff)
        return linear_layer(self.linear2, hidden)


def sinusoidal_positions(positions: Tensor, d_model: int) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/d_model)), PE(pos, 2i + 1) = cos of the same (section 3.5).

    Args:
        positions: (...), of any dtype.

    Returns:
        (..., d_model) float32.
    """
    even = torch.arange(0, d_model, 2, device=positions.device)
    angles = positions[..., None] * 10000.0 ** (-even / d_model)  # (..., d_model / 2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


class Rotary:
    """Rotary positions (Su et al. 2021): feature pairs of queries and keys, turned by angles.

    The pair (i, i + D/2) of a token at position pos turns by pos / base^(2i/D), so that a score
    depends on positions through their difference alone. Made once a forward, for all its layers.

    Args:
        positions: (N,), or (B, N) where rows differ.
        head_dim: D, even.
    """

    def __init__(self, positions: Tensor, head_dim: int, base: float = 10000.0) -> None:
        even = torch.arange(0, head_dim, 2, device=positions.device)
        angles = positions[..., None] * base ** (-even / head_dim)  # ([B,] N, D / 2)
        angles = angles.unsqueeze(-3)  # ([B,] 1, N, D / 2): the same in every head
        self.cos, self.sin = angles.cos(), angles.sin()

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, N, D) both, and again."""
        return self._turn(query), self._turn(key)

    def _turn(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = (first * self.cos - second * self.sin, first * self.sin + second * self.cos)
        return torch.cat(turned, dim=-1).to(x.dtype)


@torch.no_grad()
def init_weights(model: nn.Module, init: Callable[[str, Tensor], Any]) -> None:
    """Biases 0, norms 1, and all else by init(name, parameter)."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            init(name, parameter)


def check_tokens(
    name: str, tokens: Tensor, vocab_size: int, max_length: int, start: int = 0
) -> None:
    """Raises unless tokens are (B, N) ids that a model has, at positions that it has.

    Ids are looked at on a CPU only: a GPU would have to wait for them, and has its own assertion.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name} must be an int64 or int32 tensor of token ids; got {got}")
    if tokens.dim() != 2:
        raise ValueError(f"{name} must be (batch, length); got {shape(tokens)}")
    if start + tokens.shape[1] > max_length:
        raise ValueError(
            f"{name} must end within max_length, {max_length} positions; "
            f"got {tokens.shape[1]} tokens from position {start} on"
        )
    if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
        low, high = (int(id) for id in tokens.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{name} must hold ids from 0 to {vocab_size - 1}; got {low if low < 0 else high}"
            )


def next_tokens(
    name: str, tokens: Tensor, lengths: "Tensor | None"
) -> "tuple[Tensor, Tensor, Tensor | None]":
    """What is read and what is to be predicted from it: all tokens but the last, but the first.

    Args:
        tokens: (B, N + 1).
        lengths: (B,) of tokens.

    Returns:
        inputs (B, N), labels (B, N) with -100 past the end of a row, lengths (B,) of inputs.
    """
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise ValueError(f"{name} must be (batch, length), length 2 or more; got {shape(tokens)}")
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    if lengths is None:
        return inputs, labels, None
    lengths = lengths - 1
    positions = torch.arange(labels.shape[1], device=labels.device)
    return inputs, labels.masked_fill(positions >= lengths[:, None], -100), lengths
