"""Tables of what tensors are called elsewhere, and the one of torch.nn.Transformer.

A table says of each tensor of ours where it is there; both directions go through it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedformer.transformer.seq2seq import TransformerConfig

# --- Tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One tensor of ours, and where it is there.

    Attributes:
        theirs: its name there; if there are more, their rows one after the other are ours.
        transposed: theirs is (in, out).
        shapes: ours and theirs, where they differ otherwise.
    """

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        """Ours, from a state of theirs."""
        parts = [state[name] for name in self.theirs]
        tensor = torch.cat([part.t() for part in parts] if self.transposed else parts)
        return tensor if self.shapes is None else tensor.reshape(self.shapes[0])

    def write(self, tensor: Tensor) -> dict[str, Tensor]:
        """Theirs, of ours."""
        tensor = tensor if self.shapes is None else tensor.reshape(self.shapes[1])
        parts = [part.t() if self.transposed else part for part in tensor.chunk(len(self.theirs))]
        return {name: part.contiguous() for name, part in zip(self.theirs, parts, strict=True)}


def pair(ours: str, *theirs: str, transposed: bool = False) -> Iterator[Entry]:
    """Weight and bias of a linear layer or a norm."""
    yield Entry(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), transposed)
    yield Entry(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs))


def packed(ours: str, *theirs: str, transposed: bool = False) -> Iterator[Entry]:
    """The projections of query, key and value, which ours holds in one tensor."""
    for entry in pair("", *theirs, transposed=transposed):
        kind = entry.ours.removeprefix(".")
        yield Entry(f"{ours}.in_proj_{kind}", entry.theirs, entry.transposed)


def norm_name(stack: str, layer: int, number: int, of: int, prenorm: bool) -> str:
    """Our name of what everyone calls norm `number`, of `of`, of a layer.

    In pre-norm ours stand one further on: see blocks.py. Norm 1 of the layer after the last is the
    norm at the end of the stack.
    """
    if not prenorm:
        return f"{stack}.layers.{layer}.norm{number}"
    if number > 1:
        return f"{stack}.layers.{layer}.norm{number - 1}"
    return f"{stack}.layers.{layer - 1}.norm{of}" if layer else f"{stack}.first_norm"


def read(name: str, table: Iterable[Entry], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state, from one of theirs that has all of it.

    Raises:
        ValueError: it lacks a tensor.
    """
    table = list(table)
    missing = [theirs for entry in table for theirs in entry.theirs if theirs not in state]
    if missing:
        raise ValueError(f"{name}: the state must hold {missing[0]} ({len(missing)} are missing)")
    return {entry.ours: entry.read(state) for entry in table}


def write(table: Iterable[Entry], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state, from ours."""
    found: dict[str, Tensor] = {}
    for entry in table:
        found |= entry.write(state[entry.ours])
    return found


# --- torch.nn.Transformer -------------------------------------------------------------------------


def _torch_table(config: TransformerConfig) -> Iterator[Entry]:
    attentions = (("self_attention", "self_attn"), ("cross_attention", "multihead_attn"))
    for stack, norms in (("encoder", 2), ("decoder", 3)):
        for index in range(config.layers):
            layer = f"{stack}.layers.{index}"
            for ours, theirs in attentions[: norms - 1]:
                for kind in ("in_proj_weight", "in_proj_bias"):
                    yield Entry(f"{layer}.{ours}.{kind}", (f"{layer}.{theirs}.{kind}",))
                yield from pair(f"{layer}.{ours}.out_proj", f"{layer}.{theirs}.out_proj")
            for name in ("linear1", "linear2"):
                yield from pair(f"{layer}.feed_forward.{name}", f"{layer}.{name}")
            for number in range(1, norms + 1):
                ours = norm_name(stack, index, number, norms, config.prenorm)
                yield from pair(ours, f"{layer}.norm{number}")
        last = norm_name(stack, config.layers, 1, norms, True) if config.prenorm else None
        yield from pair(last or f"{stack}.final_norm", f"{stack}.norm")


def _check_torch(name: str, config: TransformerConfig) -> None:
    if config.share_layers or not (config.prenorm or config.final_norms):
        raise ValueError(
            f"{name}: config must have share_layers=False and, unless prenorm, final_norms=True, "
            f"as torch.nn.Transformer has; got {config}"
        )


def from_torch(state: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """The encoder and decoder of a Transformer from the state_dict of a torch.nn.Transformer.

    That has no embeddings and no output layer, so ``load_state_dict(..., strict=False)`` it.

    Raises:
        ValueError: config is of another architecture, or state lacks a tensor.
    """
    _check_torch("from_torch", config)
    return read("from_torch", _torch_table(config), state)


def to_torch(state: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """The state_dict of a torch.nn.Transformer from that of a Transformer; see from_torch()."""
    _check_torch("to_torch", config)
    return write(_torch_table(config), state)
