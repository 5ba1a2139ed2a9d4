"""Attention over a sharded sequence by all-to-all (Jacobs et al., "DeepSpeed Ulysses", 2023).

Each process trades its part of the sequence, with all heads, for all of the sequence with a part of
the heads, attends, and trades back. Two exchanges a call, each of 1 / size of what a process has
to each of the others; as many processes as there are heads of key and value, at most.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fusedformer.integrations.sequence import checked, common_seed, members
from fusedformer.kernels.attention import attention
from fusedformer.kernels.function import once_differentiable


class _Exchange(torch.autograd.Function):
    """(size, ...): part i goes to process i, whose part for us takes its place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: "ProcessGroup | None") -> Tensor:
        ctx.group = group
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        received = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, grad.contiguous(), group=ctx.group)
        return received, None


# What is exchanged is (size, n, B, h, D): n positions, h heads. With the positions first, what was
# received is a whole sequence as it lies.


def _to_heads(x: Tensor, size: int, group: "ProcessGroup | None") -> Tensor:
    """(B, H, n, D), a part of the sequence, to (B, h, N, D), a part of the heads."""
    heads = x.unflatten(1, (size, -1)).permute(1, 3, 0, 2, 4)
    return _Exchange.apply(heads.contiguous(), group).flatten(0, 1).permute(1, 2, 0, 3)


def _to_sequence(x: Tensor, size: int, group: "ProcessGroup | None") -> Tensor:
    """(B, h, N, D) to (B, H, n, D), in (B, n, H, D) memory order."""
    positions = x.permute(2, 0, 1, 3).unflatten(0, (size, -1))
    heads = _Exchange.apply(positions.contiguous(), group)
    return heads.permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2)


def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: "Tensor | None" = None,
    causal: bool = False,
    scale: "float | None" = None,
    dropout_p: float = 0.0,
    seed: "int | Tensor | None" = None,
    group: "ProcessGroup | None" = None,
    backend: "str | None" = None,
) -> Tensor:
    """attention() over a sequence of which each process has one part, by all-to-all.

    The results, those of dropout included, are those of attention() on the whole sequence, and so
    are the gradients. Every process of the group has to call it, with tensors of one shape.

    Args:
        query, key, value: this process's part, (B, H, N / size, D) and (B, Hkv, N / size, D), in
            order; H and Hkv multiples of the group's size. Query may have another length than key.
        key_lengths: (B,), counted in the whole sequence, the same in all processes.
        causal: query i of the whole sequence sees its keys j <= i; as many keys as queries.
        seed: the same in all processes; where it is None, the group's first process draws it.
        group: the processes that share the sequence, in order; all by default.
        scale, dropout_p, backend: as attention()'s.

    Returns:
        This process's part of the output, (B, H, N / size, D).

    Raises:
        ValueError, TypeError: an argument is not as above.
        RuntimeError: the backend named cannot run this call; the message says why.
    """
    name = "ulysses_attention"
    query, key, value = checked(name, query, key, value, causal, dropout_p)
    group, rank, size = members(group)
    for label, heads in (("query", query.shape[1]), ("key and value", key.shape[1])):
        if heads % size:
            raise ValueError(
                f"{name}: the heads of {label} must be a multiple of the {size} processes; got "
                f"{heads} (ring_attention() takes any number)"
            )
    seed = common_seed(name, seed, query.device, group) if dropout_p > 0 else None
    query, key, value = (_to_heads(x, size, group) for x in (query, key, value))
    out = attention(
        query, key, value, key_lengths=key_lengths, causal=causal, scale=scale,
        dropout_p=dropout_p, seed=seed, offsets=(0, rank * query.shape[1], 0, 0), backend=backend,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return _to_sequence(out, size, group)
