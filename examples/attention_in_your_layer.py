"""The fused attention in a layer of your own: one call, and memory linear in the length.

    python examples/attention_in_your_layer.py --length 512
"""

import argparse

import torch
from torch import Tensor, nn

from fusedformer import attention


class CausalSelfAttention(nn.Module):
    """(B, N, d_model) -> the same; each position sees itself and those before it."""

    def __init__(self, d_model: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        # (B, N, 3 d) -> three of (B, H, N, D); the op takes any strides, so nothing is copied.
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        mixed = attention(q, k, v, causal=True, dropout_p=p)
        return self.out(mixed.transpose(1, 2).flatten(2))


def by_hand(layer: CausalSelfAttention, x: Tensor) -> Tensor:
    """The same without dropout, with the (N, N) matrices that the op never holds."""
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    return layer.out(mixed.transpose(1, 2).flatten(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    torch.manual_seed(0)
    layer = CausalSelfAttention(d_model=256, heads=4, dropout=0.1)
    x = torch.randn(2, args.length, 256)

    layer(x).square().mean().backward()  # in training: dropout is inside the kernel
    print(f"gradient of qkv: norm {layer.qkv.weight.grad.norm():.4f}")

    layer.eval()
    difference = (layer(x) - by_hand(layer, x)).abs().max()
    print(f"largest difference from the formula: {difference:.1e}")


if __name__ == "__main__":
    main()
