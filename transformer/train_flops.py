"""Floating-point operations that the models' products need, and how fast this machine multiplies.

Model-FLOP utilisation (Chowdhery et al. 2022, appendix B) compares the two. Only what the model
needs is counted: no padding, nothing computed again, of causal attention one half. A product
of (m, k) and (k, n) is 2 m k n; its backward is twice that.
"""

import time
from collections.abc import Iterable

import torch

from fusedformer.transformer.bert import BERTConfig
from fusedformer.transformer.config import ModelConfig
from fusedformer.transformer.gpt import GPTConfig
from fusedformer.transformer.seq2seq import TransformerConfig
from fusedformer.transformer.vit import ViTConfig

_FORWARD_AND_BACKWARD = 3


def _layer(config: ModelConfig, tokens: int, keys: float) -> float:
    """Self-attention to ``keys`` keys on average, and feed-forward, of ``tokens`` tokens."""
    d, d_ff = config.d_model, config.d_ff
    projections, attention, feed_forward = 4 * d * d, 2 * keys * d, 2 * d * d_ff
    return 2 * tokens * (projections + attention + feed_forward)


def gpt(config: GPTConfig, rows: int, length: int) -> float:
    """Of a training step on ``rows`` sequences of ``length`` tokens."""
    stack = config.layers * _layer(config, rows * length, length / 2)
    output = 2 * rows * length * config.d_model * config.vocab_size
    return _FORWARD_AND_BACKWARD * (stack + output)


def bert(config: BERTConfig, rows: int, length: int, masked: int) -> float:
    """Of a training step that predicts ``masked`` tokens of ``rows`` sequences."""
    stack = config.layers * _layer(config, rows * length, length)
    output = 2 * masked * config.d_model * (config.d_model + config.vocab_size)
    return _FORWARD_AND_BACKWARD * (stack + output)


def bert_classifier(config: BERTConfig, lengths: Iterable[int]) -> float:
    """Of a training step on texts of these lengths."""
    total = 0.0
    for length in lengths:
        stack = config.layers * _layer(config, length, length)
        total += stack + 2 * config.d_model * (config.d_model + config.classes)
    return _FORWARD_AND_BACKWARD * total


def vit(config: ViTConfig, images: int) -> float:
    """Of a training step."""
    patches = (config.image_size // config.patch_size) ** 2
    stack = config.layers * _layer(config, images * (patches + 1), patches + 1)
    pixels = config.channels * config.patch_size**2
    ends = 2 * images * config.d_model * (patches * pixels + config.classes)
    return _FORWARD_AND_BACKWARD * (stack + ends)


def seq2seq(config: TransformerConfig, lengths: Iterable[tuple[int, int]]) -> float:
    """Of a training step on pairs of (source, target) lengths."""
    d, total = config.d_model, 0.0
    for source, target in lengths:
        encoder = _layer(config, source, source)
        # Cross-attention: queries and output of the target, keys and values of the source.
        cross = 2 * 2 * d * d * (target + source) + 2 * 2 * target * source * d
        decoder = _layer(config, target, target / 2) + cross
        total += config.layers * (encoder + decoder) + 2 * target * d * config.vocab_size
    return _FORWARD_AND_BACKWARD * total


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square product: the best of a few, in well under a second."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
