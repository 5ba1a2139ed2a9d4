"""Training steps of whole models, ours and the same in PyTorch, for suites to time.

A step is forward, loss and backward, and where it is asked for the optimizer: what a user waits
for. Both models have the same sizes, dropout and loss, and see the same tokens; their weights are
random. With bfloat16 they run under autocast, as one trains.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusedformer.transformer.gpt import GPT, GPTConfig
from fusedformer.transformer.layers import sinusoidal_positions
from fusedformer.transformer.seq2seq import Transformer, TransformerConfig


class TorchTransformer(nn.Module):
    """torch.nn.Transformer between the embeddings and the output layer that ours has."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        self.transformer = nn.Transformer(
            config.d_model, config.heads, config.layers, config.layers, config.d_ff,
            config.dropout, config.activation, layer_norm_eps=config.eps, batch_first=True,
            norm_first=config.prenorm,
        )  # fmt: skip
        self.dropout = nn.Dropout(config.dropout)

    def embed(self, tokens: Tensor) -> Tensor:
        width = self.embedding.embedding_dim
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) * width**0.5 + sinusoidal_positions(positions, width)
        return self.dropout(x)

    def loss(self, source: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
        inputs, labels = target[:, :-1], target[:, 1:]
        count = inputs.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(count, device=source.device)
        x = self.transformer(
            self.embed(source), self.embed(inputs), tgt_mask=mask, tgt_is_causal=True
        )
        logits = functional.linear(x, self.embedding.weight)
        return functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), label_smoothing=label_smoothing
        )


class TorchGPT(nn.Module):
    """GPT-2 in plain PyTorch, its attention torch's scaled_dot_product_attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.d_model
        self.tokens = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.positions = nn.Embedding(config.max_length, width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(_TorchGPTLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, config.eps)

    def loss(self, tokens: Tensor) -> Tensor:
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        positions = torch.arange(inputs.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(inputs) + self.positions(positions))
        for layer in self.layers:
            x = layer(x)
        logits = functional.linear(self.norm(x), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class _TorchGPTLayer(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.d_model
        self.heads, self.p = config.heads, config.dropout
        self.norm1, self.norm2 = (nn.LayerNorm(width, config.eps) for _ in range(2))
        self.packed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, config.d_ff), nn.GELU("tanh"), nn.Linear(config.d_ff, width)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = packed.permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        p = self.p if self.training else 0.0
        heads = functional.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        x = x + self.dropout(self.out(heads.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


def _autocast(device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device, dtype)


def _step(
    model: nn.Module, loss: Callable[[], Tensor], device: str, dtype: torch.dtype, optimize: bool
) -> Callable[[], Tensor]:
    """Forward, loss and backward, then AdamW where ``optimize`` says so; returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) if optimize else None

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        with _autocast(device, dtype):
            found = loss()
        found.backward()
        if optimizer is not None:
            optimizer.step()
        return found.detach()

    return step


def _loss(model: nn.Module, compiled: bool) -> Callable[..., Tensor]:
    loss = cast(Callable[..., Tensor], model.loss)
    return torch.compile(loss) if compiled else loss


def transformer_step(
    provider: str,
    batch: int,
    length: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    config: "TransformerConfig | None" = None,
    *,
    compiled: bool = False,
) -> Callable[[], Tensor]:
    """A training step of the encoder-decoder with AdamW, ours or on torch.nn.Transformer.

    Args:
        provider: "fusedformer" or "torch".
        batch, length: pairs, and tokens of each source and each target.
        dtype: float32, or bfloat16 for autocast.
        config: base with torch.nn.Transformer's choices (norms at the end, dropout within the
            feed-forward) by default.
        compiled: with the model and its loss through torch.compile.
    """
    config = config or TransformerConfig(max_length=length, final_norms=True, ff_dropout=0.1)
    torch.manual_seed(0)
    with torch.device(device):
        model = (Transformer if provider == "fusedformer" else TorchTransformer)(config)
        source = torch.randint(config.vocab_size, (batch, length))
        target = torch.randint(config.vocab_size, (batch, length + 1))
    loss = functools.partial(_loss(model, compiled), source, target, label_smoothing=0.1)
    return _step(model, loss, device, dtype, optimize=True)


def gpt_step(
    provider: str,
    batch: int,
    length: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    config: "GPTConfig | None" = None,
    *,
    compiled: bool = False,
    optimize: bool = False,
) -> Callable[[], Tensor]:
    """Forward and backward of GPT-2, ours or in plain PyTorch, with AdamW where asked.

    Args as transformer_step(); config is GPT-2's smallest size by default.
    """
    config = config or GPTConfig(max_length=length)
    torch.manual_seed(0)
    with torch.device(device):
        model = (GPT if provider == "fusedformer" else TorchGPT)(config)
        tokens = torch.randint(config.vocab_size, (batch, length + 1))
    loss = functools.partial(_loss(model, compiled), tokens)
    return _step(model, loss, device, dtype, optimize)
