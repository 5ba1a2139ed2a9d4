"""A sequence that the processes of a group share: who has what of it."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from fusedformer.kernels import rng
from fusedformer.kernels.attention import check_shapes
from fusedformer.kernels.checks import autocast, check_dropout_p
from fusedformer.kernels.dtensor import seed_of_first


class Part(NamedTuple):
    """Neighbouring positions that a process has: where they are there, and in the sequence."""

    here: slice
    start: int

    @property
    def length(self) -> int:
        return self.here.stop - self.here.start


def parts(length: int, rank: int, size: int, zigzag: bool) -> list[Part]:
    """What process ``rank`` of ``size`` has, ``length`` positions in order.

    One part, or with zigzag two: the sequence is cut into 2 size parts, of which process r has
    parts r and 2 size - 1 - r. All processes then have as much work where attention is causal.
    """
    if not zigzag:
        return [Part(slice(0, length), rank * length)]
    half = length // 2
    first, second = rank * half, (2 * size - 1 - rank) * half
    return [Part(slice(0, half), first), Part(slice(half, length), second)]


def shard_sequence(
    x: Tensor, dim: int = 1, *, group: "ProcessGroup | None" = None, zigzag: bool = False
) -> Tensor:
    """This process's part of a tensor that every process has: of tokens, labels, positions, ...

    Args:
        x: any; dimension ``dim`` is the sequence, a multiple of the group's size (twice that with
            zigzag).
        group: the processes that share the sequence, in order; all by default.
        zigzag: shared out as ring_attention(zigzag=True) takes it.

    Returns:
        x's shape, but for dim, which is divided by the group's size.

    Raises:
        ValueError: it cannot be divided.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    length, count = x.shape[dim], size * (1 + zigzag)
    if length % count:
        raise ValueError(
            f"shard_sequence: dimension {dim} must be a multiple of {count} for {size} processes"
            f"{' in a zigzag' if zigzag else ''}; got {length}: pad it (key_lengths hides padding)"
        )
    own = parts(length // size, rank, size, zigzag)
    return torch.cat([x.narrow(dim, part.start, part.length) for part in own], dim)


def gather_sequence(
    x: Tensor, dim: int = 1, *, group: "ProcessGroup | None" = None, zigzag: bool = False
) -> Tensor:
    """The inverse of shard_sequence(), in every process; no gradient flows through it."""
    size = dist.get_world_size(group)
    received = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(received, x.detach().contiguous(), group=group)
    whole = x.new_empty([size * n if d == dim % x.dim() else n for d, n in enumerate(x.shape)])
    for rank, tensor in enumerate(received):
        for part in parts(x.shape[dim], rank, size, zigzag):
            own = tensor.narrow(dim, part.here.start, part.length)
            whole.narrow(dim, part.start, part.length).copy_(own)
    return whole


def checked(
    name: str, query: Tensor, key: Tensor, value: Tensor, causal: bool, dropout_p: float
) -> "list[Tensor]":
    """Query, key and value in autocast's dtype.

    Raises:
        ValueError, TypeError: they, or the options, are not as attention() of parts asks.
    """
    for label, tensor in (("query", query), ("key", key), ("value", value)):
        if isinstance(tensor, DTensor):
            raise TypeError(
                f"{name}: {label} must be this process's part, a plain tensor; got a DTensor, "
                "whose to_local() is that"
            )
    query, key, value = autocast(name, query, key, value)
    check_shapes(name, query, key, value)
    check_dropout_p(name, dropout_p)
    if causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{name}: causal needs as many keys as queries; got {key.shape[2]} and {query.shape[2]}"
        )
    return [query, key, value]


def members(group: "ProcessGroup | None") -> tuple[ProcessGroup, int, int]:
    """The group, all processes by default; this one's place in it; how many they are."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)  # raise where there are none
    group = dist.group.WORLD if group is None else group
    assert group is not None
    return group, rank, size


def common_seed(
    name: str, seed: "int | Tensor | None", device: torch.device, group: ProcessGroup
) -> Tensor:
    """The seed given, which is to be the same in all processes, or one that the first draws."""
    given = seed is not None
    # All draw, so that generators which were in the same state stay so.
    seed = rng.as_seed(name, seed, device)
    return seed if given else seed_of_first(seed, group)
