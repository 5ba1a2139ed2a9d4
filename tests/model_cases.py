"""One small model of each kind, and what it takes, for the tests that all of them share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusedformer import (
    BERT,
    GPT,
    BERTConfig,
    GPTConfig,
    Transformer,
    TransformerConfig,
    ViT,
    ViTConfig,
)

VOCAB = 31
SIZES: dict[str, Any] = {"d_model": 32, "layers": 2, "heads": 4, "d_ff": 48, "dropout": 0.1}
TOKENS = torch.arange(39).reshape(3, 13) * 7 % VOCAB
LENGTHS = torch.tensor([13, 5, 9])
REAL = torch.arange(13) < LENGTHS[:, None]  # not padding
IMAGES = torch.linspace(-1, 1, 3 * 2 * 12 * 12).reshape(3, 2, 12, 12).sin_()
CLASSES = torch.tensor([0, 2, 1])


def seq2seq(**changes: Any) -> Transformer:
    return Transformer(TransformerConfig(**(SIZES | {"vocab_size": VOCAB} | changes)))


def gpt(**changes: Any) -> GPT:
    return GPT(GPTConfig(**(SIZES | {"vocab_size": VOCAB, "max_length": 16} | changes)))


def bert(**changes: Any) -> BERT:
    return BERT(BERTConfig(**(SIZES | {"vocab_size": VOCAB, "max_length": 16} | changes)))


def vit(**changes: Any) -> ViT:
    sizes = {"image_size": 12, "patch_size": 4, "channels": 2, "classes": 3}
    return ViT(ViTConfig(**(SIZES | sizes | changes)))


def randomize(model: nn.Module) -> nn.Module:
    """Every parameter at random, as none is at the start: biases are 0, norms 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * max(parameter.shape) ** -0.5)
    return model


# kind -> (make, its output, its loss)
MODELS: dict[str, tuple[Callable, Callable[[Any], Tensor], Callable[[Any], Tensor]]] = {
    "seq2seq": (
        seq2seq,
        lambda model: model(TOKENS, TOKENS.flip(1), LENGTHS, LENGTHS.flip(0)),
        lambda model: model.loss(TOKENS, TOKENS.flip(1), LENGTHS, LENGTHS.flip(0)),
    ),
    "gpt": (gpt, lambda model: model(TOKENS, LENGTHS), lambda model: model.loss(TOKENS, LENGTHS)),
    "bert": (
        bert,
        lambda model: model.masked_lm(model(TOKENS, None, LENGTHS)),
        lambda model: model.loss(TOKENS, TOKENS.masked_fill(~REAL, -100), None, LENGTHS),
    ),
    "vit": (vit, lambda model: model(IMAGES), lambda model: model.loss(IMAGES, CLASSES)),
}
