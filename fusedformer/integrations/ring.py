"""Attention over a sharded sequence in a ring (Liu et al., "Ring Attention with Blockwise
Transformers for Near-Infinite Context", 2023).

Keys and values go round the processes, each of which attends from its queries to those that it has
at the time, while the next ones arrive. Attention to some of the keys gives O and LSE, and two of
these are merged into those of all their keys:

    LSE = log(exp(LSE1) + exp(LSE2));  O = exp(LSE1 - LSE) O1 + exp(LSE2 - LSE) O2

The backward needs O and LSE of whole rows only (FlashAttention-2), so that it goes round once more,
the gradients of keys and values with them. Zigzag: Zhu, "ring-flash-attention" (2024).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fusedformer.integrations.sequence import checked, common_seed, members, parts
from fusedformer.kernels import dispatch, flops
from fusedformer.kernels.attention import check_length_values, checked_lengths
from fusedformer.kernels.checks import checked_scale
from fusedformer.kernels.dtensor import group_named
from fusedformer.kernels.function import Function, once_differentiable, run


@dataclass(frozen=True)
class _Ring:
    """The processes, and what does not change from block to block."""

    scale: float
    dropout_p: float
    causal: bool
    zigzag: bool
    group: ProcessGroup
    backend: str

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def pass_on(self, tensor: Tensor) -> "tuple[Tensor, list[Any]]":
        """Sends it to the next process; (what the previous one sends, what to wait for)."""
        if self.size == 1:
            return tensor, []
        received = torch.empty_like(tensor)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(
                    dist.isend, tensor, group=self.group, group_peer=(self.rank + 1) % self.size
                ),
                dist.P2POp(
                    dist.irecv, received, group=self.group, group_peer=(self.rank - 1) % self.size
                ),
            ]
        )
        return received, works

    def round(self, pair: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(owner, its keys and values), starting with our own; the next arrive meanwhile."""
        for step in range(self.size):
            last = step == self.size - 1
            following, works = (pair, []) if last else self.pass_on(pair)
            yield (self.rank - step) % self.size, pair
            _wait(works)
            pair = following

    def blocks(
        self, queries: int, keys: int, owner: int
    ) -> "Iterator[tuple[slice, slice, int | None, list[int]]]":
        """What our queries see of an owner's keys, in blocks: queries, keys, diagonal, offsets."""
        for query in parts(queries, self.rank, self.size, self.zigzag):
            for key in parts(keys, owner, self.size, self.zigzag):
                diagonal = query.start - key.start if self.causal else None
                if diagonal is not None and diagonal <= -query.length:
                    continue  # every key comes after all queries
                if diagonal is not None and diagonal >= key.length - 1:
                    diagonal = None  # none does
                yield query.here, key.here, diagonal, [0, 0, query.start, key.start]

    def arguments(
        self, query: Tensor, pair: Tensor, lengths: "Tensor | None", seed: "Tensor | None",
        diagonal: "int | None", offsets: list[int],
    ) -> tuple:  # fmt: skip
        """Those of the op, of a block."""
        key, value = pair
        if lengths is not None:
            lengths = (lengths - offsets[3]).clamp(0, key.shape[2])
        return (
            query, key, value, None, lengths, seed, diagonal, self.scale, self.dropout_p, offsets
        )  # fmt: skip


def _wait(works: "list[Any]") -> None:
    for work in works:
        work.wait()


def _merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merges a block into out and lse, in place."""
    total = torch.logaddexp(lse, block_lse)
    finite = total.masked_fill(total == -torch.inf, 0)  # rows that have seen nothing yet
    out *= (lse - finite).exp()[..., None]
    out += block_out * (block_lse - finite).exp()[..., None]
    lse.copy_(total)


# --- Ops, which torch.compile takes as they are ---------------------------------------------------

_ARGS = (
    "Tensor query, Tensor pair, Tensor? key_lengths, Tensor? seed, float scale, float dropout_p, "
    "bool causal, bool zigzag, str group, str backend"
)


def _ring(
    scale: float, dropout_p: float, causal: bool, zigzag: bool, group: str, backend: str
) -> _Ring:
    return _Ring(scale, dropout_p, causal, zigzag, group_named(group), backend)


def _new(like: Tensor) -> Tensor:
    """Zeros of a (B, H, N, D) tensor's shape to sum up in, (B, N, H, D) in memory."""
    batch, heads, length, dim = like.shape
    dtype = torch.promote_types(like.dtype, torch.float32)
    return like.new_zeros(batch, length, heads, dim, dtype=dtype).transpose(1, 2)


def _fwd(
    query: Tensor, pair: Tensor, lengths: "Tensor | None", seed: "Tensor | None", *options: Any
) -> tuple[Tensor, Tensor]:
    ring = _ring(*options)
    check_length_values(lengths, ring.size * pair.shape[3])
    out = _new(query)
    lse = out.new_full(query.shape[:3], -torch.inf)
    for owner, there in ring.round(pair):
        for q, k, diagonal, offsets in ring.blocks(query.shape[2], pair.shape[3], owner):
            tensors = query[:, :, q], there[:, :, :, k]
            args = ring.arguments(*tensors, lengths, seed, diagonal, offsets)
            block = torch.ops.fusedformer.attention_fwd.default(*args, ring.backend)
            _merge(out[:, :, q], lse[:, :, q], *block)
    return out.to(query.dtype), lse


def _bwd(
    grad_out: Tensor, out: Tensor, lse: Tensor, query: Tensor, pair: Tensor,
    lengths: "Tensor | None", seed: "Tensor | None", *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    ring = _ring(*options)
    grad_query = _new(query)
    grad_pair = torch.zeros_like(pair, dtype=lse.dtype)
    works: list[Any] = []
    for owner, there in ring.round(pair):
        own = torch.zeros_like(grad_pair)
        for q, k, diagonal, offsets in ring.blocks(query.shape[2], pair.shape[3], owner):
            tensors = query[:, :, q], there[:, :, :, k]
            args = ring.arguments(*tensors, lengths, seed, diagonal, offsets)
            block_query, *block_pair, _ = torch.ops.fusedformer.attention_bwd.default(
                grad_out[:, :, q], None, out[:, :, q], lse[:, :, q], *args, False, ring.backend
            )
            grad_query[:, :, q] += block_query
            for whole, block in zip(own, block_pair, strict=True):
                whole[:, :, k] += block
        # The sum so far of what the others found for this owner arrives; it is passed on.
        _wait(works)
        own += grad_pair
        grad_pair, works = ring.pass_on(own)
    _wait(works)  # our own, back again
    return grad_query.to(query.dtype), grad_pair.to(pair.dtype)


dispatch.register(
    f"ring_attention_fwd({_ARGS}) -> (Tensor, Tensor)",
    _fwd,
    lambda query, *args: (
        _new(query).to(query.dtype),
        query.new_empty(query.shape[:3], dtype=_new(query).dtype),
    ),
)
dispatch.register(
    f"ring_attention_bwd(Tensor grad_out, Tensor out, Tensor lse, {_ARGS}) -> (Tensor, Tensor)",
    _bwd,
    lambda grad_out, out, lse, query, pair, *args: (
        _new(query).to(query.dtype),
        torch.empty_like(pair),
    ),
)
flops.register()


class _RingAttention(Function):
    differentiable = 2

    @staticmethod
    def forward(
        query, pair, lengths, seed, scale, dropout_p, causal, zigzag, group, backend
    ):  # fmt: skip
        return torch.ops.fusedformer.ring_attention_fwd.default(
            query, pair, lengths, seed, scale, dropout_p, causal, zigzag, group, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*output, *inputs[:4])
        ctx.options = inputs[4:]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _grad_lse):
        grads = torch.ops.fusedformer.ring_attention_bwd.default(
            grad_out, *ctx.saved_tensors, *ctx.options
        )
        return (*grads, *(None,) * 8)


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: "Tensor | None" = None,
    causal: bool = False,
    zigzag: bool = False,
    scale: "float | None" = None,
    dropout_p: float = 0.0,
    seed: "int | Tensor | None" = None,
    group: "ProcessGroup | None" = None,
    backend: "str | None" = None,
) -> Tensor:
    """attention() over a sequence of which each process has one part, keys and values in a ring.

    The results and gradients are those of attention() on the whole sequence, the very same
    probabilities dropped; blocks are merged in float32. Nothing grows with the length of the whole.
    Every process of the group has to call it, with tensors of one shape.

    Args:
        query, key, value: this process's part, (B, H, N / size, D) and (B, Hkv, N / size, D), as
            shard_sequence() gives it; H a multiple of Hkv. Query may have another length than key.
            With dropout, the length of a part is a multiple of 16 (of 32 with zigzag).
        key_lengths: (B,), counted in the whole sequence, the same in all processes.
        causal: query i of the whole sequence sees its keys j <= i; as many keys as queries.
        zigzag: each process has two parts of the sequence, one from its beginning and one from its
            end, so that causal attention is as much work for all. Else the last has the most.
        seed: the same in all processes; where it is None, the group's first process draws it.
        group: the processes that share the sequence, in order; all by default.
        scale, dropout_p, backend: as attention()'s.

    Returns:
        This process's part of the output, (B, H, N / size, D).

    Raises:
        ValueError, TypeError: an argument is not as above.
        RuntimeError: the backend named cannot run this call; the message says why.
    """
    name = "ring_attention"
    query, key, value = checked(name, query, key, value, causal, dropout_p)
    group, *_ = members(group)
    multiple = (16 if dropout_p > 0 else 1) * (1 + zigzag)
    for label, tensor in (("query", query), ("key and value", key)):
        if tensor.shape[2] % multiple:
            why = " and ".join(["dropout"] * (dropout_p > 0) + ["zigzag"] * zigzag)
            raise ValueError(
                f"{name}: with {why}, the length of {label} in each process must be a multiple of "
                f"{multiple}; got {tensor.shape[2]}"
            )
    if key_lengths is not None:
        key_lengths = checked_lengths(name, key_lengths, query)
    scale = query.shape[3] ** -0.5 if scale is None else checked_scale(name, scale)
    seed = common_seed(name, seed, query.device, group) if dropout_p > 0 else None
    pair = torch.stack((key, value))  # (2, B, Hkv, Nk, D), which travels as one
    return run(
        _RingAttention, query, pair, key_lengths, seed, scale, float(dropout_p), causal, zigzag,
        group.group_name, dispatch.checked(name, backend),
    )[0]  # fmt: skip
