"""The parts that layers are made of, beside attention and norm, which are fusedformer.nn's.

Shapes: B sequences, N tokens each, H heads of size D, d_model = H D.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusedformer.kernels.activation import bias_activation
from fusedformer.kernels.checks import shape


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
        if self.activation == "relu":
            # Its derivative jumps where the sum changes its sign, as a product that is rounded to
            # 16 bits before the bias is added can make it do.
            hidden, bias = self.linear1(x), None  # (B, N, d_ff)
        else:
            # Bias, activation and dropout are one kernel.
            hidden, bias = functional.linear(x, self.linear1.weight), self.linear1.bias
        return self.linear2(bias_activation(hidden, bias, self.activation, p))


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
