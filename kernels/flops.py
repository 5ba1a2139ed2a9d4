"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the ops: matrix products, as torch.

A formula gets the op's arguments, tensors as their shapes. As torch's own it takes no notice of
masks, causal ones included: attention counts as if every query attended to every key.
"""

import sys
from collections.abc import Sequence
from math import prod
from types import ModuleType
from typing import Any

import torch

Shape = Sequence[int]


def _attention_product(query: Shape, key: Shape) -> int:
    """One of the products of attention: Q K^T, P V and, of the same size, those of the backward."""
    batch, heads, queries, dim = query
    return 2 * batch * heads * queries * key[2] * dim


def _attention_fwd(query: Shape, key: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * _attention_product(query, key)


def _attention_bwd(
    grad_out: Shape, grad_lse: Any, out: Shape, lse: Shape, query: Shape, key: Shape,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """The scores once more, then the gradients of probabilities, values, queries and keys."""
    return 5 * _attention_product(query, key)


def _linear_product(input: Shape, linear_weight: Shape) -> int:
    return 2 * prod(input) * linear_weight[0]


def _linear_cross_entropy_fwd(
    input: Shape, linear_weight: Shape, bias: Any, target: Any, weight: Any, ignore_index: int,
    smoothing: float, wanted: "list[bool]", *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """The logits, and the gradients of input and weight that are wanted of this call."""
    return (1 + sum(wanted[:2])) * _linear_product(input, linear_weight)


def _linear_cross_entropy_bwd(
    grad_losses: Shape, lse: Shape, *args: Any, **kwargs: Any
) -> int:  # fmt: skip
    """The same, the logits made once more: only where losses are not reduced."""
    return _linear_cross_entropy_fwd(*args)


def _ring_attention_fwd(query: Shape, pair: Shape, *args: Any, **kwargs: Any) -> int:
    """A process's queries with the keys of all."""
    *_, group, _backend = args
    size = torch.distributed.distributed_c10d._resolve_process_group(group).size()
    return size * _attention_fwd(query, pair[1:])


def _ring_attention_bwd(
    grad_out: Shape, out: Shape, lse: Shape, *args: Any, **kwargs: Any
) -> int:  # fmt: skip
    return _ring_attention_fwd(*args) // 2 * 5


FORMULAS = {
    "attention_fwd": _attention_fwd,
    "attention_bwd": _attention_bwd,
    "linear_cross_entropy_fwd": _linear_cross_entropy_fwd,
    "linear_cross_entropy_bwd": _linear_cross_entropy_bwd,
    # Known once fusedformer.integrations.parallel is imported.
    "ring_attention_fwd": _ring_attention_fwd,
    "ring_attention_bwd": _ring_attention_bwd,
}

_COUNTER = "torch.utils.flop_counter"


def _tell(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        op = getattr(torch.ops.fusedformer, name, None)
        if op is not None and op not in counter.flop_registry:
            counter.register_flop_formula(op)(formula)


class _OnImport:
    """Registers the formulas when somebody imports torch's counter.

    Not before: it imports Triton, which takes longer than all else that fusedformer imports.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _COUNTER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for f in others if (s := f.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_tell(module: ModuleType) -> None:
            execute(module)
            _tell(module)

        # On this loader alone, which is the module's own; types have no word for that.
        spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Makes the ops there are known to torch's counter, whether it is imported or is to be."""
    if _COUNTER in sys.modules:
        _tell(sys.modules[_COUNTER])
    if not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())
