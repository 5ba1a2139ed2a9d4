"""BERT, an encoder-only Transformer (Devlin et al. 2019).

B sequences of N tokens. Every position sees every other; what is learned from is a token that was
masked out, or the class of the whole sequence.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusedformer.kernels.checks import shape
from fusedformer.nn import Dropout, LayerNorm
from fusedformer.transformer.blocks import EncoderLayer, Stack
from fusedformer.transformer.config import ModelConfig
from fusedformer.transformer.layers import (
    check_tokens,
    init_weights,
    linear_activation,
    output_cross_entropy,
)


@dataclass(frozen=True)
class BERTConfig(ModelConfig):
    """The defaults are those of BERT base, uncased."""

    vocab_size: int = 30522
    max_length: int = 512
    segments: int = 2  # sentence A and sentence B
    classes: int = 2  # of classify(): the next sentence or not, in pre-training
    d_model: int = 768
    layers: int = 12
    heads: int = 12
    d_ff: int = 3072
    dropout: float = 0.1
    activation: str = "gelu"
    prenorm: bool = False
    eps: float = 1e-12
    share_layers: bool = False

    PRESETS: ClassVar = {
        "base": {},  # 110M parameters
        "large": {"d_model": 1024, "layers": 24, "heads": 16, "d_ff": 4096},  # 336M
    }


class BERT(nn.Module):
    """tokens (B, N) -> hidden (B, N, d_model), for the two heads masked_lm() and classify()."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.config = config
        d_model = config.d_model
        self.token_embedding = nn.Embedding(config.vocab_size, d_model)  # output layer, too
        self.position_embedding = nn.Embedding(config.max_length, d_model)
        self.segment_embedding = nn.Embedding(config.segments, d_model)
        self.embedding_norm = LayerNorm(d_model, config.eps)
        self.encoder = Stack(EncoderLayer, config, config.layers)
        # Of masked_lm(): a layer, its norm, and the output's bias.
        self.head_linear = nn.Linear(d_model, d_model)
        self.head_norm = LayerNorm(d_model, config.eps)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        # Of classify().
        self.pooler = nn.Linear(d_model, d_model)
        self.dropout = Dropout(config.dropout)
        self.classifier = nn.Linear(d_model, config.classes)
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 0.02), as the paper's code."""
        init_weights(self, lambda name, weight: nn.init.normal_(weight, std=0.02))

    def forward(
        self,
        tokens: Tensor,
        segments: "Tensor | None" = None,
        lengths: "Tensor | None" = None,
        hidden_states: bool = False,
    ) -> "Tensor | tuple[Tensor, list[Tensor]]":
        """What the heads read.

        Args:
            tokens: (B, N) int.
            segments: (B, N) int, the segment of each token; all 0 by default.
            lengths: (B,) int; tokens past them are padding, and no other token sees them.
            hidden_states: also return the residual stream after each layer.

        Returns:
            (B, N, d_model); with hidden_states also a list of (B, N, d_model).

        Raises:
            ValueError, TypeError: an argument is not as above, or does not fit max_length.
        """
        config = self.config
        check_tokens("BERT: tokens", tokens, config.vocab_size, config.max_length)
        if segments is None:
            segments = torch.zeros_like(tokens[:1])  # (1, N)
        else:
            check_tokens("BERT: segments", segments, config.segments, config.max_length)
            if segments.shape != tokens.shape:
                raise ValueError(
                    f"BERT: segments must be {shape(tokens)}, as tokens; got {shape(segments)}"
                )
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens)  # (B, N, d_model)
        x = x + self.position_embedding(positions) + self.segment_embedding(segments)
        states: list[Tensor] | None = [] if hidden_states else None
        x = self.encoder(self.embedding_norm(x), lengths, states=states)
        return x if states is None else (x, states)

    def _masked_lm_input(self, hidden: Tensor) -> Tensor:
        x = linear_activation(self.head_linear, hidden, self.config.activation)
        return self.head_norm(x)

    def masked_lm(self, hidden: Tensor) -> Tensor:
        """hidden (B, N, d_model) -> logits (B, N, vocab_size) of the token at each position."""
        x = self._masked_lm_input(hidden)
        return functional.linear(x, self.token_embedding.weight, self.head_bias)

    def cross_entropy(self, hidden: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """That of masked_lm(hidden), which is never all there; see output_cross_entropy()."""
        x, weight = self._masked_lm_input(hidden), self.token_embedding.weight
        return output_cross_entropy(x, weight, labels, self.head_bias, **options)

    def _pooled(self, hidden: Tensor) -> Tensor:
        """What stands for the whole sequence, (B, d_model): its first token, [CLS]."""
        return self.dropout(torch.tanh(self.pooler(hidden[:, 0])))

    def classify(self, hidden: Tensor) -> Tensor:
        """hidden (B, N, d_model) -> logits (B, classes)."""
        return self.classifier(self._pooled(hidden))

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        segments: "Tensor | None" = None,
        lengths: "Tensor | None" = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Mean cross-entropy of the tokens that labels holds: the masked language model.

        Args:
            tokens: (B, N) int, some of them masked.
            labels: (B, N) int, what stood there; -100 where nothing is to be predicted.
            segments, lengths: as in forward().
        """
        hidden = self(tokens, segments, lengths)
        return self.cross_entropy(hidden, labels, label_smoothing=label_smoothing)

    def classification_loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        segments: "Tensor | None" = None,
        lengths: "Tensor | None" = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Mean cross-entropy of labels, (B,) int, each the class of a sequence."""
        x = self._pooled(self(tokens, segments, lengths))
        return output_cross_entropy(
            x, self.classifier.weight, labels, self.classifier.bias,
            label_smoothing=label_smoothing,
        )  # fmt: skip
