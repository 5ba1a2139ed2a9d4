"""The parts of a GPT's training step, each timed alone. These functions run in worker processes.

Each part is what the model calls, on tensors of the model's sizes, forward with backward; its time
counts as often as a step calls it. What the parts leave of the whole step is the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fusedformer
from fusedformer.benchmarks import model_steps, timing, workers
from fusedformer.benchmarks.ops import common
from fusedformer.benchmarks.ops.models import Case
from fusedformer.transformer.layers import FeedForward

WHOLE = "whole step"
ATTENTION, FEED_FORWARD = "attention", "feed-forward"


@dataclass(frozen=True)
class Part:
    """One part: its call, how often a step makes it, and its operations, forward and backward."""

    call: Callable[[], object]
    count: int
    flops: float


def parts(case: Case) -> dict[str, Part]:
    """The parts of a step, by name, from what grows fastest with the length."""
    dtype = common.DTYPES[case.dtype]
    batch, seq, width, heads = case.batch, case.seq, case.width, case.heads
    tokens, layers = batch * seq, case.layers
    generator = common.generator(case, 0)

    def random(*size: int) -> Tensor:
        return common.random(generator, size, case)

    def trained(module: nn.Module, *inputs: Tensor) -> Callable[[], object]:
        module = module.to(case.device, dtype)
        leaves = [tensor.requires_grad_() for tensor in inputs]
        return _step(lambda: module(*leaves), [*leaves, *module.parameters()])

    qkv = [random(batch, heads, seq, width // heads).requires_grad_() for _ in range(3)]
    x, residual = (random(batch, seq, width).requires_grad_() for _ in range(2))
    scale, shift = random(width).requires_grad_(), random(width).requires_grad_()
    table = random(case.vocab, width).requires_grad_()
    ids = torch.randint(case.vocab, (batch, seq), generator=generator, device=case.device)
    positions = random(seq, width).requires_grad_()

    def attention() -> object:
        return fusedformer.attention(*qkv, causal=True, dropout_p=case.dropout)

    def norm() -> object:
        return fusedformer.dropout_add_layer_norm(
            x, residual, scale, shift, case.dropout, prenorm=True
        )

    def embedding() -> Tensor:
        return nn.functional.embedding(ids, table) + positions

    def loss() -> Tensor:
        return fusedformer.linear_cross_entropy(x, table, ids)

    projections = nn.ModuleList([nn.Linear(width, 3 * width), nn.Linear(width, width)])
    feed_forward = FeedForward(width, 4 * width, "gelu_tanh")
    product = 2.0 * tokens * width
    return {
        ATTENTION: Part(_step(attention, qkv), layers, 3.5 * 2 * tokens * seq * width),
        FEED_FORWARD: Part(
            trained(feed_forward, random(batch, seq, width)), layers, 3 * product * 8 * width
        ),
        "projections": Part(
            trained(_Projections(projections), random(batch, seq, width)),
            layers,
            3 * product * 4 * width,
        ),
        "norms, dropout, residuals": Part(
            _step(norm, [x, residual, scale, shift]), 2 * layers + 1, 0.0
        ),
        "output and loss": Part(_step(loss, [x, table]), 1, 3 * product * case.vocab),
        "embedding": Part(_step(embedding, [table, positions]), 1, 0.0),
    }


class _Projections(nn.Module):
    """Queries, keys and values from one product, and what follows attention."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> "tuple[Tensor, Tensor]":
        packed, out = self.layers
        return packed(x), out(x)


def _step(forward: Callable[[], Any], leaves: list[Tensor]) -> Callable[[], object]:
    """A call of forward, then of its backward; the gradients of the outputs are random."""
    made: list[Tensor] = []

    def call() -> object:
        out = forward()
        outputs = out if isinstance(out, tuple) else (out,)
        if not made:
            made.extend(torch.randn_like(tensor) for tensor in outputs)
        return torch.autograd.grad(outputs, leaves, made)

    return call


def times(case: Case, seconds: float, rounds: int) -> dict[str, dict]:
    """Milliseconds of the whole step and of its parts, in turns.

    Returns:
        name -> {"ms": [...], "count", "flops"}, ms of one call.
    """
    held = parts(case)
    dtype = common.DTYPES[case.dtype]
    step = model_steps.gpt_step(
        "fusedformer", case.batch, case.seq, dtype, case.device, config=case.gpt()
    )
    held[WHOLE] = Part(step, 1, sum(part.flops * part.count for part in held.values()))
    found = timing.time_interleaved(
        {name: timing.whole([part.call]) for name, part in held.items()},
        timing.clock_for(case.device),
        seconds=seconds,
        min_rounds=3,
        max_rounds=rounds,
        warmup=2,
    )
    for name, result in found.items():
        if "error" in result:
            outcome = workers.failure(result["error"])
            raise RuntimeError(f"{name}: {outcome.reason}")
    return {
        name: {"ms": found[name]["ms"], "count": part.count, "flops": part.flops}
        for name, part in held.items()
    }
