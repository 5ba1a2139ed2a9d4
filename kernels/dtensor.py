"""Ops on DTensors: each device computes its part of the result from its parts of the inputs.

How the first tensor of a call (query, x, input) is sharded decides. The other tensors are brought
into the placements that go with it, the op runs on what is local, forward and backward, and its
results are DTensors again; gradients that devices have parts of are Partial. Dropout takes the seed
of the mesh's first device. Attention's mask is then that of the whole problem, by its offsets; the
other ops, which have none, draw an independent mask for each shard.

function.run() comes here; without DTensors this file is not even imported.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from fusedformer.kernels import dispatch
from fusedformer.kernels import function as plain

# Which dimension of a tensor goes with one of the first tensor's; None: every device has all of it.
Goes = Callable[[int, int], "int | None"]  # called with the dimension and the number of them


def _along(dim: int, _dims: int) -> "int | None":
    return dim


def _whole(_dim: int, _dims: int) -> "int | None":
    return None


def _batch(dim: int, _dims: int) -> "int | None":
    return dim if dim == 0 else None


def _columns(dim: int, dims: int) -> "int | None":
    return 0 if dim == dims - 1 else None


@dataclass(frozen=True)
class _Rule:
    """How an op's autograd.Function may be sharded; ``args`` are the Function's."""

    op: str
    first: str  # the name of its first argument
    inputs: tuple[Goes, ...]  # of the tensors, which come first in args
    outputs: Callable[[tuple], tuple[Goes, ...]]  # of the results that are tensors for the caller
    shardable: Callable[[tuple], Sequence[int]]  # dimensions of the first tensor
    advice: str  # ... in words
    seed: "int | None" = None  # its place in args
    offsets: "int | None" = None


def _rows(args: tuple) -> Sequence[int]:
    return range(args[0].dim() - 1)


_RULES = {
    "_Attention": _Rule(
        "attention",
        "query",
        (_along, _along, _along, _along, _batch),
        lambda args: (_along, _along),
        lambda args: (0, 1),
        "shard batch or heads; for sequences see ring_attention and ulysses_attention in "
        "fusedformer.integrations.parallel",
        seed=5,
        offsets=9,
    ),
    "_DropoutAddLayerNorm": _Rule(
        "dropout_add_layer_norm",
        "x",
        (_along, _along, _whole, _whole),
        lambda args: (_along, _along) if args[8] else (_along,),  # z, with prenorm
        _rows,
        "shard any dimension but the last",
        seed=4,
    ),
    "_Dropout": _Rule(
        "dropout", "x", (_along,), lambda args: (_along,), lambda args: range(args[0].dim()),
        "use Shard", seed=1,
    ),
    "_BiasActivation": _Rule(
        "bias_activation", "x", (_along, _columns), lambda args: (_along,),
        lambda args: range(args[0].dim()), "use Shard", seed=2,
    ),
    "_CrossEntropy": _Rule(
        "cross_entropy",
        "input",
        (_along, _along, _whole),
        lambda args: (_along, _along),
        _rows,
        "shard any dimension but the classes",
    ),
    "_LinearCrossEntropy": _Rule(
        "linear_cross_entropy",
        "input",
        (_along, _whole, _whole, _along, _whole),
        lambda args: (_along,),
        lambda args: _rows(args) if args[7] == "none" else (),
        "shard any dimension but the last, with reduction='none'",
    ),
}  # fmt: skip


@torch.compiler.disable(reason="fusedformer's ops on DTensors run between compiled graphs")
def run(function: type[plain.Function], args: tuple) -> Any:
    """``function`` of args, the first of which is a DTensor; see the top of this file.

    Raises:
        ValueError: a tensor's placements are not supported.
    """
    rule, first = _RULES[function.__name__], args[0]
    mesh, dims = first.device_mesh, first.dim()
    layout = [_sharded(rule, placement, args) for placement in first.placements]
    local = list(args)
    for index, goes in enumerate(rule.inputs):
        if args[index] is not None:
            local[index] = _local(rule, args[index], first, layout, goes)
    if rule.seed is not None and args[rule.seed] is not None:
        local[rule.seed] = _common_seed(args[rule.seed], mesh)
        if rule.offsets is None:
            # Far apart, so that no two shards of calls with seeds 0, 1, 2, ... have one in common.
            local[rule.seed] += _place(mesh, [dim is not None for dim in layout])[0] * 0x9E3779B97F
    if rule.offsets is not None:
        offsets = list(args[rule.offsets])
        for dim in rule.shardable(args):
            index, count = _place(mesh, [dim == sharded for sharded in layout])
            offsets[dim] += index * (first.shape[dim] // count)
        local[rule.offsets] = offsets
    results = plain.run(function, *local)
    several = isinstance(results, tuple)
    outputs = list(results) if several else [results]
    for index, goes in enumerate(rule.outputs(args)):
        placements = [_placement(None if dim is None else goes(dim, dims)) for dim in layout]
        outputs[index] = DTensor.from_local(outputs[index], mesh, placements, run_check=False)
    return tuple(outputs) if several else outputs[0]


def _placement(dim: "int | None") -> Any:
    return Replicate() if dim is None else Shard(dim)


def _sharded(rule: _Rule, placement: Any, args: tuple) -> "int | None":
    """The dimension of the first tensor that a placement shards; what is Partial is summed up."""
    if isinstance(placement, (Replicate, Partial)):
        return None
    # Other kinds of shards (torch has private ones) lie in an order that Shard does not have.
    if type(placement) is not Shard or placement.dim not in rule.shardable(args):
        raise ValueError(
            f"{rule.op}: {rule.first} is a DTensor placed as {args[0].placements}, and {placement} "
            f"is not supported: {rule.advice}"
        )
    return placement.dim


def _local(rule: _Rule, tensor: Any, first: Any, layout: list, goes: Goes) -> Tensor:
    """This device's part of a tensor; of one that is no DTensor, which then is the whole."""
    mesh = first.device_mesh
    if not isinstance(tensor, DTensor):
        if tensor.requires_grad:
            raise ValueError(
                f"{rule.op}: {rule.first} is a DTensor, so a tensor that requires a gradient must "
                f"be one; got a plain {tuple(tensor.shape)} (see distribute_tensor)"
            )
        whole = [Replicate()] * mesh.ndim
        tensor = DTensor.from_local(tensor, mesh, whole, run_check=False)
    elif tensor.device_mesh != mesh:
        raise ValueError(
            f"{rule.op}: all DTensors must be on the mesh of {rule.first}, {mesh}; "
            f"got one on {tensor.device_mesh}"
        )
    own = [None if dim is None else goes(dim, first.dim()) for dim in layout]
    for n, dim in enumerate(layout):
        mine = own[n]
        if mine is None or dim is None:
            continue
        if tensor.shape[mine] == 1 != first.shape[dim]:  # it broadcasts
            own[n] = None
            continue
        count = _place(mesh, [dim == other for other in layout])[1]
        if tensor.shape[mine] % count:
            raise ValueError(
                f"{rule.op}: dimension {mine} of a {tuple(tensor.shape)} tensor is sharded over "
                f"{count} devices, so its size must be a multiple of {count}"
            )
    grads = [
        Partial() if dim is not None and mine is None else _placement(mine)
        for dim, mine in zip(layout, own, strict=True)
    ]
    tensor = tensor.redistribute(placements=[_placement(mine) for mine in own])
    return tensor.to_local(grad_placements=grads)


def _place(mesh: DeviceMesh, which: Sequence[bool]) -> tuple[int, int]:
    """(index, count) of this device's shard, of what the mesh dimensions chosen divide."""
    index, count = 0, 1
    here = mesh.get_coordinate()
    assert here is not None, "this process is not in the mesh of its tensors"
    for size, coordinate, chosen in zip(mesh.shape, here, which, strict=True):
        if chosen:
            index, count = index * size + coordinate, count * size
    return index, count


def _common_seed(seed: Tensor, mesh: DeviceMesh) -> Tensor:
    """The seed of the mesh's first device."""
    for dim in range(mesh.ndim):
        seed = seed_of_first(seed, mesh.get_group(dim))
    return seed


# --- A seed for all -------------------------------------------------------------------------------


def seed_of_first(seed: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The seed that the first process of a group has."""
    return torch.ops.fusedformer.seed_of_first.default(seed, group.group_name)


def _seed_of_first(seed: Tensor, group: str) -> Tensor:
    seed = seed.clone()
    dist.broadcast(seed, group=group_named(group), group_src=0)
    return seed


def group_named(name: Any) -> dist.ProcessGroup:
    """Ops, which take no objects, get a group's name, a string."""
    return dist.distributed_c10d._resolve_process_group(name)


# An op, as torch.compile does not know broadcast().
dispatch.register(
    "seed_of_first(Tensor seed, str group) -> Tensor",
    _seed_of_first,
    lambda seed, group: torch.empty_like(seed),
)
