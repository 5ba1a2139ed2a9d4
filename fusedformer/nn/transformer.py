"""The Transformer's layers (Vaswani et al. 2017) as torch.nn has them, and stacks of them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fusedformer.kernels.activation import bias_activation
from fusedformer.nn.attention import MultiheadAttention
from fusedformer.nn.layers import Dropout, DropoutAddLayerNorm, LayerNorm
from fusedformer.nn.linear import is_plain, linear, linear_layer

Activation = Callable[[Tensor], Tensor]


def _fused_name(activation: Activation) -> "str | None":
    """What bias_activation() calls it, or None where it has no such activation."""
    if activation is functional.relu or type(activation) is torch.nn.ReLU:
        return "relu"
    if activation is functional.gelu:
        return "gelu"
    if type(activation) is torch.nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if activation is functional.silu or type(activation) is torch.nn.SiLU:
        return "silu"
    return None


class _Layer(torch.nn.Module):
    """What the encoder's and the decoder's layer share. Both read, post-norm and pre-norm,

    x = norm(x + dropout(sublayer(x)))  and  x = x + dropout(sublayer(norm(x))).

    A DropoutAddLayerNorm is one kernel for all but the sublayer, in pre-norm together with the norm
    that the next sublayer begins with. So the first pre-norm adds nothing up, and what the last
    sublayer gives is added by itself.

    The layers that fuse() makes of torch's own have other parts, and methods that norm with them.
    """

    norm_first: bool
    self_attn: torch.nn.MultiheadAttention
    dropout: torch.nn.Dropout
    norm1: torch.nn.LayerNorm  # in post-norm, a DropoutAddLayerNorm

    def _run(self, x: Tensor, *sublayers: Activation) -> Tensor:
        if not self.norm_first:
            for number, sublayer in enumerate(sublayers, 1):
                x = self._add_norm(number, sublayer(x), x)
            return x
        x, residual = self._first_norm(x), x
        for number, sublayer in enumerate(sublayers[:-1], 2):
            x, residual = self._add_norm(number, sublayer(x), residual)
        return residual + getattr(self, f"dropout{len(sublayers)}")(sublayers[-1](x))

    def _first_norm(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def _add_norm(self, number: int, x: Tensor, residual: Tensor) -> Any:
        """The norm of that number of residual + dropout(x); in pre-norm that sum, too."""
        if not self.norm_first:
            # Under autocast sublayers give 16 bits. The sums have the input's dtype, as pre-norm's.
            x = x.to(residual.dtype)
        return getattr(self, f"norm{number}")(x, residual)

    def _make_feed_forward(
        self,
        d_model: int,
        width: int,
        dropout: float,
        activation: "str | Activation",
        **options: Any,
    ) -> None:
        if isinstance(activation, str):
            if activation not in ("relu", "gelu"):
                raise ValueError(
                    f"{type(self).__name__}: activation must be 'relu', 'gelu' or a callable; "
                    f"got {activation!r}"
                )
            activation = functional.relu if activation == "relu" else functional.gelu
        self.linear1 = torch.nn.Linear(d_model, width, **options)
        self.dropout = Dropout(dropout)
        self.linear2 = torch.nn.Linear(width, d_model, **options)
        self.activation = activation

    def _feed_forward(self, x: Tensor) -> Tensor:
        name = _fused_name(self.activation)
        if name is None:
            return self.linear2(self.dropout(self.activation(self.linear1(x))))
        p = self.dropout.p if self.dropout.training else 0.0
        bias, first = None, self.linear1
        # ReLU's derivative jumps at zero, so that the sum must not change its sign: a product that
        # is rounded to 16 bits before its bias is added can. The others are smooth.
        if name != "relu" and is_plain(first):
            # Bias, activation and dropout are one kernel, forward and backward.
            hidden, bias = linear(x, first.weight), first.bias
        else:
            hidden = linear_layer(first, x)
        return linear_layer(self.linear2, bias_activation(hidden, bias, name, p))


def _attend(
    attention: torch.nn.Module, x: Tensor, memory: Tensor, mask: "Tensor | None",
    padding: "Tensor | None", is_causal: bool,
) -> Tensor:  # fmt: skip
    return attention(
        x, memory, memory, padding, need_weights=False, attn_mask=mask, is_causal=is_causal
    )[0]


class _EncoderLayer(_Layer):
    def forward(
        self,
        src: Tensor,
        src_mask: "Tensor | None" = None,
        src_key_padding_mask: "Tensor | None" = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The layer's output, in src's layout; masks as MultiheadAttention's.

        Args:
            src: (B, N, d_model) with batch_first, else (N, B, d_model); without a batch
                (N, d_model).
            src_mask: (N, N) or (B * H, N, N), attn_mask of the self-attention.
            src_key_padding_mask: (B, N), without a batch (N,).
            is_causal: position i attends to positions j <= i; src_mask may then be None.
        """

        def attend(x: Tensor) -> Tensor:
            return _attend(self.self_attn, x, x, src_mask, src_key_padding_mask, is_causal)

        return self._run(src, attend, self._feed_forward)


class _DecoderLayer(_Layer):
    multihead_attn: torch.nn.MultiheadAttention

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: "Tensor | None" = None,
        memory_mask: "Tensor | None" = None,
        tgt_key_padding_mask: "Tensor | None" = None,
        memory_key_padding_mask: "Tensor | None" = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The layer's output, in tgt's layout; masks as MultiheadAttention's.

        Args:
            tgt: (B, Nt, d_model) with batch_first, else (Nt, B, d_model); without a batch
                (Nt, d_model).
            memory: the encoder's output, (B, Ns, d_model) in tgt's layout.
            tgt_mask, memory_mask: (Nt, Nt) and (Nt, Ns), or (B * H, ...) each.
            tgt_key_padding_mask, memory_key_padding_mask: (B, Nt) and (B, Ns).
            tgt_is_causal: position i attends to positions j <= i; tgt_mask may then be None.
            memory_is_causal: the same for memory.
        """

        def attend(x: Tensor) -> Tensor:
            return _attend(self.self_attn, x, x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

        def attend_to_memory(x: Tensor) -> Tensor:
            return _attend(
                self.multihead_attn, x, memory, memory_mask, memory_key_padding_mask,
                memory_is_causal,
            )  # fmt: skip

        return self._run(tgt, attend, attend_to_memory, self._feed_forward)


class TransformerEncoderLayer(_EncoderLayer):
    """``torch.nn.TransformerEncoderLayer``: same arguments, same state_dict.

    Self-attention and a feed-forward net, each with dropout, the residual sum and a layer norm,
    which norms before the sublayer with norm_first, else after it. The dropout of a sublayer's
    output is the attribute ``p`` of the norm that follows it.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: "str | Activation" = functional.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: "torch.device | str | None" = None,
        dtype: "torch.dtype | None" = None,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.self_attn = MultiheadAttention(
            d_model, nhead, dropout, batch_first=batch_first, **options
        )
        self._make_feed_forward(d_model, dim_feedforward, dropout, activation, **options)
        norms: dict[str, Any] = {"eps": layer_norm_eps, **options}
        if norm_first:
            self.norm1 = LayerNorm(d_model, **norms)
            self.norm2 = DropoutAddLayerNorm(d_model, dropout, prenorm=True, **norms)
            self.dropout2 = Dropout(dropout)
        else:
            self.norm1 = DropoutAddLayerNorm(d_model, dropout, **norms)
            self.norm2 = DropoutAddLayerNorm(d_model, dropout, **norms)


class TransformerDecoderLayer(_DecoderLayer):
    """``torch.nn.TransformerDecoderLayer``: same arguments, same state_dict.

    As TransformerEncoderLayer, with attention to an encoder's output between the two sublayers.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: "str | Activation" = functional.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: "torch.device | str | None" = None,
        dtype: "torch.dtype | None" = None,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.self_attn = MultiheadAttention(
            d_model, nhead, dropout, batch_first=batch_first, **options
        )
        self.multihead_attn = MultiheadAttention(
            d_model, nhead, dropout, batch_first=batch_first, **options
        )
        self._make_feed_forward(d_model, dim_feedforward, dropout, activation, **options)
        norms: dict[str, Any] = {"eps": layer_norm_eps, **options}
        if norm_first:
            self.norm1 = LayerNorm(d_model, **norms)
            self.norm2 = DropoutAddLayerNorm(d_model, dropout, prenorm=True, **norms)
            self.norm3 = DropoutAddLayerNorm(d_model, dropout, prenorm=True, **norms)
            self.dropout3 = Dropout(dropout)
        else:
            self.norm1 = DropoutAddLayerNorm(d_model, dropout, **norms)
            self.norm2 = DropoutAddLayerNorm(d_model, dropout, **norms)
            self.norm3 = DropoutAddLayerNorm(d_model, dropout, **norms)


# --- Stacks ---------------------------------------------------------------------------------------


def _copies(layer: torch.nn.Module, count: int) -> torch.nn.ModuleList:
    return torch.nn.ModuleList(copy.deepcopy(layer) for _ in range(count))


def _is_causal(mask: "Tensor | None", hint: "bool | None") -> bool:
    """The hint, or without one whether mask is the causal one, which attention takes for less.

    Looked for on a CPU only, and not while compiling: a GPU would have to be waited for.
    """
    if hint is not None or mask is None:
        return bool(hint)
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or mask.dim() != 2:
        return False
    causal = torch.ones(mask.shape, dtype=torch.bool).triu(1)
    if mask.dtype != torch.bool:
        causal = torch.zeros(mask.shape, dtype=mask.dtype).masked_fill(causal, -torch.inf)
    return mask.shape[0] == mask.shape[1] and torch.equal(mask, causal)


class TransformerEncoder(torch.nn.Module):
    """``torch.nn.TransformerEncoder``: num_layers copies of a layer, then norm, if there is one.

    enable_nested_tensor and mask_check, torch's, are taken and change nothing.
    """

    def __init__(
        self,
        encoder_layer: torch.nn.Module,
        num_layers: int,
        norm: "torch.nn.Module | None" = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__()
        self.layers = _copies(encoder_layer, num_layers)
        self.num_layers = num_layers
        self.norm = norm

    def forward(
        self,
        src: Tensor,
        mask: "Tensor | None" = None,
        src_key_padding_mask: "Tensor | None" = None,
        is_causal: "bool | None" = None,
    ) -> Tensor:
        """The last layer's output; arguments as TransformerEncoderLayer's.

        is_causal None: on a CPU a causal mask is recognised, else mask is used as it is.
        """
        is_causal = _is_causal(mask, is_causal)
        x = src
        for layer in self.layers:
            x = layer(
                x, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal
            )
        return x if self.norm is None else self.norm(x)


class TransformerDecoder(torch.nn.Module):
    """``torch.nn.TransformerDecoder``: num_layers copies of a layer, then norm, if there is one."""

    def __init__(
        self,
        decoder_layer: torch.nn.Module,
        num_layers: int,
        norm: "torch.nn.Module | None" = None,
    ) -> None:
        super().__init__()
        self.layers = _copies(decoder_layer, num_layers)
        self.num_layers = num_layers
        self.norm = norm

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: "Tensor | None" = None,
        memory_mask: "Tensor | None" = None,
        tgt_key_padding_mask: "Tensor | None" = None,
        memory_key_padding_mask: "Tensor | None" = None,
        tgt_is_causal: "bool | None" = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The last layer's output; arguments as TransformerDecoderLayer's.

        tgt_is_causal None: on a CPU a causal tgt_mask is recognised, else it is used as it is.
        """
        tgt_is_causal = _is_causal(tgt_mask, tgt_is_causal)
        x = tgt
        for layer in self.layers:
            x = layer(
                x, memory, tgt_mask=tgt_mask, memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask, tgt_is_causal=tgt_is_causal,
                memory_is_causal=memory_is_causal,
            )  # fmt: skip
        return x if self.norm is None else self.norm(x)


class Transformer(torch.nn.Transformer):
    """``torch.nn.Transformer``, an encoder and a decoder: same arguments, same state_dict."""

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: "str | Activation" = functional.relu,
        custom_encoder: "torch.nn.Module | None" = None,
        custom_decoder: "torch.nn.Module | None" = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: "torch.device | str | None" = None,
        dtype: "torch.dtype | None" = None,
    ) -> None:
        layer = (
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        norm: Any = {"eps": layer_norm_eps, "bias": bias, "device": device, "dtype": dtype}
        if custom_encoder is None:
            custom_encoder = TransformerEncoder(
                TransformerEncoderLayer(*layer), num_encoder_layers, LayerNorm(d_model, **norm)
            )
        if custom_decoder is None:
            custom_decoder = TransformerDecoder(
                TransformerDecoderLayer(*layer), num_decoder_layers, LayerNorm(d_model, **norm)
            )
        super().__init__(
            d_model, nhead, batch_first=batch_first, custom_encoder=custom_encoder,
            custom_decoder=custom_decoder,
        )  # fmt: skip
