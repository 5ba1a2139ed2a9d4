"""GPT-2, a decoder-only Transformer (Radford et al. 2019).

B sequences of N tokens. Each position sees itself and what is before it, and predicts the token
after it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fusedformer.nn.linear import linear
from fusedformer.transformer.blocks import EncoderLayer, Stack
from fusedformer.transformer.cache import KVCache
from fusedformer.transformer.config import ModelConfig
from fusedformer.transformer.layers import (
    Rotary,
    check_tokens,
    init_weights,
    next_tokens,
    output_cross_entropy,
)


@dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """The defaults are GPT-2's smallest size."""

    vocab_size: int = 50257
    max_length: int = 1024
    d_model: int = 768
    layers: int = 12
    heads: int = 12
    d_ff: int = 3072
    dropout: float = 0.1
    activation: str = "gelu_tanh"
    prenorm: bool = True
    eps: float = 1e-5
    share_layers: bool = False
    rotary: bool = False  # rotary positions in place of learned ones

    PRESETS: ClassVar = {
        "small": {},  # 124M parameters
        "medium": {"d_model": 1024, "layers": 24, "heads": 16, "d_ff": 4096},  # 355M
        "large": {"d_model": 1280, "layers": 36, "heads": 20, "d_ff": 5120},  # 774M
        "xl": {"d_model": 1600, "layers": 48, "heads": 25, "d_ff": 6400},  # 1558M
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotary and self.d_model // self.heads % 2:
            raise ValueError(
                "GPTConfig: d_model / heads must be even for rotary positions; "
                f"got {self.d_model} / {self.heads}"
            )


class GPT(nn.Module):
    """tokens (B, N) -> logits (B, N, vocab_size) of the token after each."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)  # output layer, too
        self.position_embedding = None
        if not config.rotary:
            self.position_embedding = nn.Embedding(config.max_length, config.d_model)
        self.stack = Stack(EncoderLayer, config, config.layers)
        self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's: N(0, 0.02), and less for what adds to the residual stream."""
        adds = 0.02 / (2 * self.config.layers) ** 0.5  # 2 sublayers a layer: the sum keeps its size

        def init(name: str, weight: Tensor) -> None:
            added = name.endswith(("out_proj.weight", "linear2.weight"))
            nn.init.normal_(weight, std=adds if added else 0.02)

        init_weights(self, init)

    def hidden(
        self,
        tokens: Tensor,
        lengths: "Tensor | None" = None,
        cache: "KVCache | None" = None,
        states: "list[Tensor] | None" = None,
    ) -> Tensor:
        """What the output layer reads, (B, N, d_model); see forward()."""
        config = self.config
        start = 0 if cache is None else cache.longest
        check_tokens("GPT: tokens", tokens, config.vocab_size, config.max_length, start)
        count = tokens.shape[1]
        if cache is None:
            positions = torch.arange(count, device=tokens.device)  # (N,)
        else:
            positions = cache.positions(count, lengths)  # (N,) or (B, N)
        x = self.token_embedding(tokens)  # (B, N, d_model)
        rotary = None
        if self.position_embedding is None:
            rotary = Rotary(positions, config.d_model // config.heads)
        else:
            x = x + self.position_embedding(positions)
        x = self.stack(x, lengths, True, rotary, cache=cache, states=states)
        if cache is not None:
            cache.advance(count, lengths)
        return x

    def forward(
        self,
        tokens: Tensor,
        lengths: "Tensor | None" = None,
        cache: "KVCache | None" = None,
        hidden_states: bool = False,
    ) -> "Tensor | tuple[Tensor, list[Tensor]]":
        """Logits of the token after each.

        Args:
            tokens: (B, N) int.
            lengths: (B,) int; tokens past them are padding, and no other token sees them.
            cache: from new_cache(); tokens then follow those that it holds.
            hidden_states: also return the residual stream after each layer.

        Returns:
            (B, N, vocab_size); with hidden_states also a list of (B, N, d_model).

        Raises:
            ValueError, TypeError: tokens are not as above, or do not fit max_length or the cache.
        """
        states: list[Tensor] | None = [] if hidden_states else None
        logits = self.logits(self.hidden(tokens, lengths, cache, states))
        return logits if states is None else (logits, states)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., d_model) -> logits (..., vocab_size)."""
        return linear(hidden, self.token_embedding.weight)

    def cross_entropy(self, hidden: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """That of logits(hidden), which are never all there; see output_cross_entropy()."""
        return output_cross_entropy(hidden, self.token_embedding.weight, labels, **options)

    def loss(
        self, tokens: Tensor, lengths: "Tensor | None" = None, label_smoothing: float = 0.0
    ) -> Tensor:
        """Mean cross-entropy of each token but the first, given those before it.

        Args:
            tokens: (B, N + 1) int.
            lengths: (B,) int; tokens past them are neither read nor predicted.
        """
        inputs, labels, lengths = next_tokens("GPT.loss: tokens", tokens, lengths)
        hidden = self.hidden(inputs, lengths)
        return self.cross_entropy(hidden, labels, label_smoothing=label_smoothing)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for batch sequences of up to capacity tokens."""
        return KVCache(self.config.layers, batch, capacity, self.token_embedding.weight.device)
