"""What fuse() turns layers of Hugging Face transformers into; see layers.py.

transformers repeats its layers model by model. A class is known here if its forward is, instruction
by instruction, that of one of the few below, in the version that is installed.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers.activations import NewGELUActivation
from transformers.models.bert.modeling_bert import BertSelfOutput
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fusedformer.integrations.layers import Fused, dropout_add_norm, hooked
from fusedformer.integrations.rules import CHAIN, NORM, Rule
from fusedformer.kernels.activation import bias_activation
from fusedformer.kernels.layer_norm import rms_norm


def _dropout_add_norm(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    if hooked(self.dropout, self.LayerNorm):
        return self.original.forward(self, hidden_states, input_tensor)
    x = self.dense(hidden_states)
    return dropout_add_norm(self.dropout, self.LayerNorm, x, input_tensor)


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    # Of wider weights the result is wider, as the product with them is.
    dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
    return rms_norm(hidden_states.to(dtype), self.weight, self.variance_epsilon)


def _gelu_tanh(self: Any, input: Tensor) -> Tensor:
    return bias_activation(input, None, "gelu_tanh")


# A class, its forward here, and its rule without the class, which rule_for() makes.
_KNOWN: "tuple[tuple[type, Callable[..., Tensor], Rule], ...]" = (
    (
        BertSelfOutput,
        _dropout_add_norm,
        Rule(
            Fused,
            CHAIN,
            NORM,
            {"dropout": torch.nn.Dropout, "LayerNorm": torch.nn.LayerNorm},
        ),
    ),
    (LlamaRMSNorm, _rms_norm, Rule(Fused, "RMS norm", NORM)),
    (T5LayerNorm, _rms_norm, Rule(Fused, "RMS norm", NORM)),
    (NewGELUActivation, _gelu_tanh, Rule(Fused, "GELU (tanh)", "bias_activation")),
)


class _Layer(Fused):
    """Pickled by the original class, as its own is made when it is asked for."""

    def __reduce_ex__(self, protocol: Any) -> "tuple[Any, ...]":
        return _new, (self.original,), self.__dict__


def _new(original: type) -> Any:
    rule = rule_for(original)
    assert rule is not None
    fused: Any = rule.fused
    return fused.__new__(fused)


@functools.cache
def rule_for(original: type) -> "Rule | None":
    """How modules of a class of transformers are fused, or None."""
    forward = original.__dict__.get("forward")
    if not isinstance(forward, FunctionType):
        return None
    for known, ours, rule in _KNOWN:
        if _code(forward) == _code(known.__dict__["forward"]):
            names = {"forward": ours, "original": original, "__module__": __name__}
            return replace(rule, fused=type(original.__name__, (_Layer, original), names))
    return None


def _code(function: FunctionType) -> tuple[Any, ...]:
    code = function.__code__
    return code.co_code, code.co_names, code.co_consts, code.co_varnames
