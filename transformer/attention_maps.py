"""The attention weights of a whole model, which the fused kernels never hold.

Each attention computes them once more, by the reference formula softmax(scale Q K^T + mask).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fusedformer.transformer.generate import evaluation


@contextmanager
def recorded_attention(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """A list to which every attention of the model adds (its name, its weights) when it runs.

    Weights are (B, H, Nq, Nk). For models whose attention is torch.nn.MultiheadAttention or
    fusedformer.nn's, and whose forward does not use the weights itself.
    """
    found: list[tuple[str, Tensor]] = []

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "need_weights": True, "average_attn_weights": False}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found.append((name, output[1].detach()))

        return hook

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            hooks.append(module.register_forward_pre_hook(ask, with_kwargs=True))
            hooks.append(module.register_forward_hook(keep(name)))
    try:
        with warnings.catch_warnings():
            # That weights cost time and memory is known here.
            warnings.filterwarnings("ignore", message=".*need_weights")
            yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention_weights(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The weights of every attention in ``model(*args, **kwargs)``, run without dropout.

    Returns:
        for each kind of attention its weights, (layers, B, H, Nq, Nk) float32. Kinds are named
        after the first and the last part of the modules' names, such as
        "encoder.self_attention" and "decoder.cross_attention".
    """
    with evaluation(model), recorded_attention(model) as found:
        model(*args, **kwargs)
    kinds: dict[str, list[Tensor]] = {}
    for name, weights in found:
        first, _, rest = name.partition(".")
        kinds.setdefault(f"{first}.{rest.rpartition('.')[2]}", []).append(weights.float())
    return {kind: torch.stack(layers) for kind, layers in kinds.items()}
