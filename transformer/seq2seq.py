"""The Transformer of Vaswani et al. 2017, "Attention Is All You Need": an encoder and a decoder.

B pairs of a source of Ns tokens and a target of Nt. The encoder reads the source; the decoder
reads the target so far and the encoder's output, and predicts each next target token. The sections
named are the paper's. The layers are in blocks.py, attention itself in fusedformer.nn.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fusedformer.nn.linear import linear
from fusedformer.transformer.blocks import DecoderLayer, EncoderLayer, Stack
from fusedformer.transformer.cache import KVCache
from fusedformer.transformer.config import ModelConfig
from fusedformer.transformer.layers import (
    check_tokens,
    init_weights,
    next_tokens,
    output_cross_entropy,
    sinusoidal_positions,
)


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """The defaults are the paper's base model (table 3)."""

    vocab_size: int = 37000  # of the target, and of the source unless that has its own
    source_vocab_size: int | None = None
    max_length: int = 1024
    d_model: int = 512
    layers: int = 6  # of the encoder, and as many of the decoder
    heads: int = 8
    d_ff: int = 2048
    dropout: float = 0.1
    activation: str = "relu"
    prenorm: bool = False
    eps: float = 1e-5
    share_layers: bool = False
    share_embeddings: bool = True  # source, target and output: one matrix (section 3.4)
    final_norms: bool = False  # after each post-norm stack, as torch.nn.Transformer has them

    PRESETS: ClassVar = {
        "base": {},
        "big": {"d_model": 1024, "heads": 16, "d_ff": 4096, "dropout": 0.3},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % 2:
            raise ValueError(
                "TransformerConfig: d_model must be even for sinusoidal positions; "
                f"got {self.d_model}"
            )
        if self.share_embeddings and self.source_vocab_size not in (None, self.vocab_size):
            raise ValueError(
                "TransformerConfig: source_vocab_size must be vocab_size where embeddings are "
                f"shared; got {self.source_vocab_size} and {self.vocab_size}"
            )


class Transformer(nn.Module):
    """source (B, Ns), target (B, Nt) -> logits (B, Nt, vocab_size) of the token after each."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        vocab_size, d_model = config.vocab_size, config.d_model
        self.target_embedding = nn.Embedding(vocab_size, d_model)
        if not config.share_embeddings:
            self.source_embedding = nn.Embedding(config.source_vocab_size or vocab_size, d_model)
            self.output = nn.Linear(d_model, vocab_size, bias=False)
        self.encoder = Stack(EncoderLayer, config, config.layers, config.final_norms)
        self.decoder = Stack(DecoderLayer, config, config.layers, config.final_norms)
        self.init_weights()

    def init_weights(self) -> None:
        """Embeddings N(0, 1/d_model), so that times sqrt(d_model) they have variance 1; Glorot."""

        def init(name: str, weight: Tensor) -> None:
            if "embedding" in name:
                nn.init.normal_(weight, std=self.config.d_model**-0.5)
            else:
                nn.init.xavier_uniform_(weight)

        init_weights(self, init)

    def embed(self, embedding: nn.Embedding, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embeddings times sqrt(d_model), plus sinusoidal positions (sections 3.4 and 3.5)."""
        d_model = self.config.d_model
        x = embedding(tokens)  # (B, N, d_model)
        added = sinusoidal_positions(positions, d_model).to(x.dtype)  # (N, d_model) or as x
        return torch.add(added, x, alpha=d_model**0.5)

    def encode(
        self,
        source: Tensor,
        source_lengths: "Tensor | None" = None,
        states: "list[Tensor] | None" = None,
    ) -> Tensor:
        """The memory that the decoder attends to.

        Args:
            source: (B, Ns) int.
            source_lengths: (B,) int; tokens past them are padding.
            states: a list to which the residual stream after each layer is added.

        Returns:
            (B, Ns, d_model).
        """
        shared = self.config.share_embeddings
        embedding = self.target_embedding if shared else self.source_embedding
        vocab_size, max_length = embedding.num_embeddings, self.config.max_length
        check_tokens("Transformer: source", source, vocab_size, max_length)
        positions = torch.arange(source.shape[1], device=source.device)
        x = self.embed(embedding, source, positions)
        return self.encoder(x, source_lengths, states=states)

    def hidden(
        self,
        target: Tensor,
        memory: Tensor,
        source_lengths: "Tensor | None" = None,
        target_lengths: "Tensor | None" = None,
        cache: "KVCache | None" = None,
        states: "list[Tensor] | None" = None,
    ) -> Tensor:
        """What the output layer reads, (B, Nt, d_model); see decode()."""
        vocab_size, max_length = self.config.vocab_size, self.config.max_length
        start = 0 if cache is None else cache.longest
        check_tokens("Transformer: target", target, vocab_size, max_length, start)
        count = target.shape[1]
        if cache is None:
            positions = torch.arange(count, device=target.device)  # (Nt,)
        else:
            positions = cache.positions(count, target_lengths)  # (Nt,) or (B, Nt)
        x = self.embed(self.target_embedding, target, positions)
        x = self.decoder(x, memory, target_lengths, source_lengths, cache=cache, states=states)
        if cache is not None:
            cache.advance(count, target_lengths)
        return x

    def _output_weight(self) -> Tensor:
        return (self.target_embedding if self.config.share_embeddings else self.output).weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., d_model) -> logits (..., vocab_size): the final linear layer."""
        return linear(hidden, self._output_weight())

    def cross_entropy(self, hidden: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """That of logits(hidden), which are never all there; see output_cross_entropy()."""
        return output_cross_entropy(hidden, self._output_weight(), labels, **options)

    def decode(
        self,
        target: Tensor,
        memory: Tensor,
        source_lengths: "Tensor | None" = None,
        target_lengths: "Tensor | None" = None,
        cache: "KVCache | None" = None,
        states: "list[Tensor] | None" = None,
    ) -> Tensor:
        """Logits of the token after each of target.

        Args:
            target: (B, Nt) int, <sos> first; with a cache, those after the ones that it holds.
            memory: (B, Ns, d_model), from encode().
            source_lengths, target_lengths: (B,) int; what is past them is padding.
            cache: from new_cache(). It keeps what it needs of memory, too.
            states: a list to which the residual stream after each layer is added.

        Returns:
            (B, Nt, vocab_size).
        """
        hidden = self.hidden(target, memory, source_lengths, target_lengths, cache, states)
        return self.logits(hidden)

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: "Tensor | None" = None,
        target_lengths: "Tensor | None" = None,
        hidden_states: bool = False,
    ) -> "Tensor | tuple[Tensor, tuple[list[Tensor], list[Tensor]]]":
        """Logits of the token after each of target; see encode() and decode().

        Returns:
            (B, Nt, vocab_size); with hidden_states also two lists, the encoder's and the decoder's,
            of the residual stream after each layer.

        Raises:
            ValueError, TypeError: tokens are not as above, or do not fit max_length.
        """
        states: tuple[list[Tensor], list[Tensor]] | None = ([], []) if hidden_states else None
        of_encoder, of_decoder = states or (None, None)
        memory = self.encode(source, source_lengths, of_encoder)
        logits = self.decode(target, memory, source_lengths, target_lengths, states=of_decoder)
        return logits if states is None else (logits, states)

    def loss(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: "Tensor | None" = None,
        target_lengths: "Tensor | None" = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Mean cross-entropy of each target token but the first, given source and those before it.

        Args:
            source: (B, Ns) int.
            target: (B, Nt + 1) int, from <sos> to <eos>.
            source_lengths, target_lengths: (B,) int; tokens past them are neither read nor
                predicted.
            label_smoothing: 0.1 in the paper (section 5.4).
        """
        name = "Transformer.loss: target"
        inputs, labels, target_lengths = next_tokens(name, target, target_lengths)
        memory = self.encode(source, source_lengths)
        hidden = self.hidden(inputs, memory, source_lengths, target_lengths)
        return self.cross_entropy(hidden, labels, label_smoothing=label_smoothing)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for batch targets of up to capacity tokens."""
        return KVCache(self.config.layers, batch, capacity, self.target_embedding.weight.device)
