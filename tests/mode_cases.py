"""Every public op and module once, small, with all that is random or optional in it switched on."""

from collections.abc import Callable

import torch
from torch import Tensor

import fusedformer

nn = fusedformer.nn
WIDTH, HEADS, CLASSES = 16, 2, 20


class Call(torch.nn.Module):
    """A function as a module, with a parameter of some shapes."""

    def __init__(self, function: Callable, *shapes: tuple) -> None:
        super().__init__()
        self.function = function
        self.leaves = torch.nn.ParameterList([torch.randn(shape) for shape in shapes])

    def forward(self, *inputs: Tensor) -> "Tensor | tuple[Tensor, Tensor]":
        return self.function(*inputs, *self.leaves)


class Attend(torch.nn.Module):
    """MultiheadAttention of one input, which two of the modes want."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            WIDTH, HEADS, 0.3, batch_first=True, add_bias_kv=True, add_zero_attn=True
        )
        self.options = options

    def forward(self, x: Tensor) -> "Tensor | tuple[Tensor, Tensor]":
        out, weights = self.attention(x, x, x, is_causal=True, **self.options)
        return out if weights is None else (out, weights)


def _heads(function: Callable) -> Callable:
    """A function of (B, H, N, D) as one of (B, N, E)."""

    def call(x: Tensor, *others: Tensor) -> Tensor:
        x = x.view(*x.shape[:-1], HEADS, -1).transpose(1, 2)
        return function(x, *others).transpose(1, 2).flatten(2)

    return call


def _layer(cls: type, **options) -> torch.nn.Module:
    return cls(WIDTH, HEADS, 2 * WIDTH, 0.3, "gelu", batch_first=True, **options)


def _rows(batch: int, length: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, length, WIDTH),)


def _two(batch: int, length: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, length, WIDTH) for _ in range(2))


def _tokens(batch: int, length: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, length, WIDTH), torch.randint(CLASSES, (batch, length))


def _logits(batch: int, length: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, CLASSES, length), torch.randint(CLASSES, (batch, length))


# By name: the module, and its inputs for a batch and a length.
CASES: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[int, int], tuple[Tensor, ...]]]] = {
    "attention": (
        lambda: Call(
            _heads(
                lambda x, mask: fusedformer.attention(
                    x, x, x, mask=mask, causal=True, dropout_p=0.3
                )
            ),
            (HEADS, 1, 1),
        ),
        _rows,
    ),
    "scaled_dot_product_attention": (
        lambda: Call(
            _heads(
                lambda x: fusedformer.scaled_dot_product_attention(
                    x, x, x, is_causal=True, dropout_p=0.3
                )
            )
        ),
        _rows,
    ),
    "dropout_add_layer_norm": (
        lambda: Call(
            lambda *args: fusedformer.dropout_add_layer_norm(*args, dropout_p=0.3, prenorm=True),
            (WIDTH,),
            (WIDTH,),
        ),
        _two,
    ),
    "layer_norm": (lambda: Call(fusedformer.layer_norm, (WIDTH,), (WIDTH,)), _rows),
    "rms_norm": (lambda: Call(fusedformer.rms_norm, (WIDTH,)), _rows),
    "dropout": (lambda: Call(lambda x: fusedformer.dropout(x, 0.3)), _rows),
    "bias_activation": (
        lambda: Call(lambda x, b: fusedformer.bias_activation(x, b, dropout_p=0.3), (WIDTH,)),
        _rows,
    ),
    "cross_entropy": (
        lambda: Call(
            lambda x, y: fusedformer.cross_entropy(
                x.mT.flatten(0, 1), y.flatten(), label_smoothing=0.1
            )
        ),
        _logits,
    ),
    "linear_cross_entropy": (
        lambda: Call(
            lambda x, y, w, b: fusedformer.linear_cross_entropy(
                x, w, y, linear_bias=b, reduction="none"
            ),
            (CLASSES, WIDTH),
            (CLASSES,),
        ),
        _tokens,
    ),
    "LayerNorm": (lambda: nn.LayerNorm(WIDTH), _rows),
    "RMSNorm": (lambda: nn.RMSNorm(WIDTH), _rows),
    "Dropout": (lambda: nn.Dropout(0.3), _rows),
    "DropoutAddLayerNorm": (lambda: nn.DropoutAddLayerNorm(WIDTH, 0.3, prenorm=True), _two),
    "CrossEntropyLoss": (lambda: nn.CrossEntropyLoss(ignore_index=3), _logits),
    "LinearCrossEntropyLoss": (
        lambda: nn.LinearCrossEntropyLoss(WIDTH, CLASSES, bias=True),
        _tokens,
    ),
    "MultiheadAttention": (lambda: Attend(need_weights=False), _rows),
    "MultiheadAttention with weights": (lambda: Attend(), _rows),
    "TransformerEncoderLayer": (lambda: _layer(nn.TransformerEncoderLayer), _rows),
    "TransformerDecoderLayer": (
        lambda: _layer(nn.TransformerDecoderLayer, norm_first=True),
        _two,
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer, norm_first=True), 2),
        _rows,
    ),
    "TransformerDecoder": (
        lambda: nn.TransformerDecoder(
            _layer(nn.TransformerDecoderLayer), 2, nn.LayerNorm(WIDTH)
        ),
        _two,
    ),
    "Transformer": (
        lambda: nn.Transformer(WIDTH, HEADS, 1, 1, 2 * WIDTH, 0.3, batch_first=True),
        _two,
    ),
}


def results(module: torch.nn.Module, inputs: tuple[Tensor, ...], seed: int = 5) -> list[Tensor]:
    """Outputs, gradients of the floating inputs and of the parameters, under a seed."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    module.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    outputs = module(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    # Weights that differ, and that meta tensors have, too.
    weights = [torch.arange(y.numel(), device=y.device).cos().view(y.shape) for y in outputs]
    sum((y * weight).sum() for y, weight in zip(outputs, weights, strict=True)).backward()
    gradients = [leaf.grad for leaf in (*leaves, *module.parameters()) if leaf.grad is not None]
    return [*(output.detach() for output in outputs), *gradients]
