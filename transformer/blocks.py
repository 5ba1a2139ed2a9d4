"""The layers of a Transformer, and a stack of them.

Two values run through a stack: x, which the next sublayer reads, and residual, the stream to which
every sublayer adds its output. The two meet in one kernel, ``add_norm``:

    residual = residual + dropout(output);  x = layer_norm(residual)

In post-norm (Vaswani et al. 2017) the norm is part of the stream, so residual is x from then on; in
pre-norm (GPT-2, ViT) the stream goes on without it. Thus one piece of code serves both, and only
the counting of norms is unusual: a pre-norm layer, too, holds the norms *after* its sublayers. Its
last one is what others call the first norm of the layer that follows or, in the last layer, the
final norm; the norm before the very first sublayer is the stack's.
"""

from collections.abc import Callable

from torch import Tensor, nn

from fusedformer.nn import Dropout, DropoutAddLayerNorm, LayerNorm, MultiheadAttention
from fusedformer.transformer.cache import KVCache, LayerCache
from fusedformer.transformer.config import ModelConfig
from fusedformer.transformer.layers import FeedForward, Rotary


def add_norm(norm: DropoutAddLayerNorm, output: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(x, residual) after a sublayer's output; see above. All (B, N, d_model)."""
    if norm.prenorm:
        return norm(output, residual)
    x = norm(output, residual)
    return x, x


def attention_of(config: ModelConfig) -> MultiheadAttention:
    return MultiheadAttention(config.d_model, config.heads, config.dropout, batch_first=True)


def norm_of(config: ModelConfig) -> DropoutAddLayerNorm:
    return DropoutAddLayerNorm(config.d_model, config.dropout, config.eps, prenorm=config.prenorm)


def feed_forward_of(config: ModelConfig) -> FeedForward:
    return FeedForward(config.d_model, config.d_ff, config.activation, config.ff_dropout)


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward; with causal=True, a layer of a decoder-only model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = attention_of(config)
        self.norm1 = norm_of(config)
        self.feed_forward = feed_forward_of(config)
        self.norm2 = norm_of(config)

    def forward(
        self,
        x: Tensor,  # (B, N, d_model)
        residual: Tensor,  # (B, N, d_model)
        lengths: "Tensor | None" = None,  # (B,) of x; what lies past them is padding
        causal: bool = False,
        rotary: "Rotary | None" = None,
        cache: "LayerCache | None" = None,
    ) -> tuple[Tensor, Tensor]:
        output, _ = self.self_attention(
            x, x, x, need_weights=False, key_lengths=lengths, is_causal=causal, rotary=rotary,
            cache=cache,
        )  # fmt: skip
        x, residual = add_norm(self.norm1, output, residual)
        return add_norm(self.norm2, self.feed_forward(x), residual)


class DecoderLayer(nn.Module):
    """Masked self-attention, then attention to the encoder's output, then feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = attention_of(config)
        self.norm1 = norm_of(config)
        self.cross_attention = attention_of(config)
        self.norm2 = norm_of(config)
        self.feed_forward = feed_forward_of(config)
        self.norm3 = norm_of(config)

    def forward(
        self,
        x: Tensor,  # (B, Nt, d_model)
        residual: Tensor,  # (B, Nt, d_model)
        memory: Tensor,  # (B, Ns, d_model), the encoder's output
        lengths: "Tensor | None" = None,  # (B,) of x
        memory_lengths: "Tensor | None" = None,  # (B,) of memory
        cache: "LayerCache | None" = None,
    ) -> tuple[Tensor, Tensor]:
        output, _ = self.self_attention(
            x, x, x, need_weights=False, key_lengths=lengths, is_causal=True, cache=cache
        )
        x, residual = add_norm(self.norm1, output, residual)
        output, _ = self.cross_attention(
            x, memory, memory, need_weights=False, key_lengths=memory_lengths,
            cache=None if cache is None else cache.cross,
        )  # fmt: skip
        x, residual = add_norm(self.norm2, output, residual)
        return add_norm(self.norm3, self.feed_forward(x), residual)


class Stack(nn.Module):
    """Layers one after the other, and the norms that belong to none of them.

    Args:
        layer: EncoderLayer or DecoderLayer.
        depth: how many; with config.share_layers, how often the one layer is used.
        final_norm: a norm after the last layer. Pre-norm stacks end in a norm in any case.
    """

    def __init__(
        self,
        layer: Callable[[ModelConfig], nn.Module],
        config: ModelConfig,
        depth: int,
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        self.depth = depth
        self.first_norm = norm_of(config) if config.prenorm else None
        self.dropout = Dropout(config.dropout)  # of embeddings; in pre-norm the first norm's
        unlike = 1 if config.share_layers else depth
        self.layers = nn.ModuleList(layer(config) for _ in range(unlike))
        add = final_norm and not config.prenorm
        self.final_norm = LayerNorm(config.d_model, config.eps) if add else None

    def forward(
        self,
        x: Tensor,
        *inputs: object,
        cache: "KVCache | None" = None,
        states: "list[Tensor] | None" = None,
    ) -> Tensor:
        """The output, (B, N, d_model).

        Args:
            x: (B, N, d_model), embeddings, whose dropout is applied here.
            inputs: what each layer takes beside x, residual and cache.
            states: a list to which the residual stream after each layer is added.
        """
        if self.first_norm is not None:
            x, residual = self.first_norm(x)  # residual = dropout(x), and its norm
        else:
            x = residual = self.dropout(x)
        for index in range(self.depth):
            layer = self.layers[index % len(self.layers)]
            layer_cache = None if cache is None else cache.layers[index]
            x, residual = layer(x, residual, *inputs, cache=layer_cache)
            if states is not None:
                states.append(residual)
        return x if self.final_norm is None else self.final_norm(x)
