"""Cross-entropy of logits, and of a linear layer whose logits are never kept.

Bytes of cross_entropy: the forward reads the logits, the backward reads them and writes their
gradient. FLOPs of linear_cross_entropy: 2 N H V for the logits, twice that for the gradients, and
nothing for logits that are made again; its bytes are not counted.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

import fusedformer
from fusedformer.benchmarks.ops import common, row_peers
from fusedformer.benchmarks.ops.common import Distance, Held, Impl, Op, Sizes


@dataclass(frozen=True)
class Case(Sizes):
    """One problem: logits of ``rows`` tokens over ``vocab`` classes, from ``hidden`` features."""

    rows: int
    vocab: int
    hidden: int = 0
    dtype: str = "fp32"
    device: str = "cpu"
    dropout_p: float = 0.0


def _targets(case: Case, generator: torch.Generator) -> Tensor:
    return torch.randint(case.vocab, (case.rows,), generator=generator, device=case.device)


def _grad(case: Case) -> Tensor:
    return torch.ones((), dtype=common.DTYPES[case.dtype], device=case.device)


def _checked(case: Case) -> Case:
    return case.at(rows=min(case.rows, max(64, 2**25 // case.vocab)))


def _tiny(case: Case) -> Case:
    return case.at(rows=min(case.rows, 4))


def _compare(formula: Callable) -> Callable[..., dict[str, float]]:
    """Against the formula in float64, in parts of rows: a mean is a sum of means of parts."""

    def compare(
        case: Case,
        held: Held,
        out: Tensor,
        grads: "tuple[Tensor, ...] | None",
        seed: "int | None" = None,
    ) -> dict[str, float]:
        x, *others, target = held.args
        loss = torch.zeros((), dtype=torch.float64, device=out.device)
        sums = [torch.zeros(t.shape, dtype=torch.float64, device=t.device) for t in others]
        d_x, distances = Distance(), []
        block = max(1, 2**23 // case.vocab)
        for start in range(0, case.rows, block):
            rows = slice(start, start + block)
            part = Held([x[rows], *others, target[rows]], held.grad).exact()
            share = len(part.args[-1]) / case.rows
            value = formula(*part.args) * share
            loss += value.detach()
            if grads is None:
                continue
            d_part, *d_others = common.backward_of(part)(value)
            d_x.add(grads[0][rows], d_part)
            for total, more in zip(sums, d_others, strict=True):
                total += more
        forward = Distance()
        forward.add(out, loss)
        found = {"forward": forward.value()}
        if grads is not None:
            distances = [d_x]
            for got, truth in zip(grads[1:], sums, strict=True):
                distances.append(Distance())
                distances[-1].add(got, truth)
            found["backward"] = max(distance.value() for distance in distances)
        return found

    return compare


# --- cross_entropy --------------------------------------------------------------------------------


def _logits_inputs(case: Case, seed: int = 0) -> Held:
    generator = common.generator(case, seed)
    logits = common.random(generator, (case.rows, case.vocab), case, 2.0).requires_grad_()
    return Held([logits, _targets(case, generator)], _grad(case))


def _seeded(
    case: Case, seed: "int | None" = None, backend: "str | None" = None
) -> Callable[..., Tensor]:
    return functools.partial(fusedformer.cross_entropy, backend=backend)


def _bytes(case: Case, mode: str) -> float:
    logits = float(case.rows * case.vocab * common.DTYPES[case.dtype].itemsize)
    return logits * common.cost(mode, 1, 2)


def _logits_peak(impl: str, case: Case) -> float:
    return 4 * 4.0 * case.rows * case.vocab


CROSS_ENTROPY = Op(
    name="cross_entropy",
    case=Case,
    inputs=_logits_inputs,
    impls={
        "fused": Impl("fusedformer.cross_entropy", _seeded),
        "eager": Impl("torch.nn.functional.cross_entropy", lambda case: functional.cross_entropy),
        "compile": Impl(
            "torch.compile of eager",
            lambda case: common.compiled(functional.cross_entropy),
            compiles=True,
        ),
        **row_peers.CROSS_ENTROPY,
    },
    eager="eager",
    flops=lambda case, mode: 0.0,
    moved=_bytes,
    seeded=_seeded,
    compare=_compare(functional.cross_entropy),
    checked=_checked,
    tiny=_tiny,
    peak=_logits_peak,
    x="vocab",
)


# --- linear_cross_entropy -------------------------------------------------------------------------


def _linear_inputs(case: Case, seed: int = 0) -> Held:
    generator = common.generator(case, seed)
    x = common.random(generator, (case.rows, case.hidden), case).requires_grad_()
    weight = common.random(generator, (case.vocab, case.hidden), case, 2.0 / case.hidden**0.5)
    return Held([x, weight.requires_grad_(), _targets(case, generator)], _grad(case))


def _linear_loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(x, weight), target)


def _linear_seeded(
    case: Case, seed: "int | None" = None, backend: "str | None" = None
) -> Callable[..., Tensor]:
    return functools.partial(fusedformer.linear_cross_entropy, backend=backend)


def _linear_flops(case: Case, mode: str) -> float:
    product = 2.0 * case.rows * case.hidden * case.vocab
    return product * common.cost(mode, 1, 2)


def _linear_peak(impl: str, case: Case) -> float:
    weight = 4.0 * case.vocab * case.hidden
    return weight + (0.0 if impl == "fused" else _logits_peak(impl, case))


def _no_torch_loss(case: Case) -> "str | None":
    return None if hasattr(functional, "linear_cross_entropy") else "torch has none before 2.13"


LINEAR = Op(
    name="linear_cross_entropy",
    case=Case,
    inputs=_linear_inputs,
    impls={
        "fused": Impl("fusedformer.linear_cross_entropy", _linear_seeded),
        "eager": Impl("cross_entropy(linear(x, w)) in eager PyTorch", lambda case: _linear_loss),
        "compile": Impl(
            "torch.compile of eager", lambda case: common.compiled(_linear_loss), compiles=True
        ),
        "torch": Impl(
            "torch.nn.functional.linear_cross_entropy, its default options",
            lambda case: functional.linear_cross_entropy,
            _no_torch_loss,
        ),
        **row_peers.LINEAR_CROSS_ENTROPY,
    },
    eager="eager",
    flops=_linear_flops,
    moved=lambda case, mode: 0.0,
    seeded=_linear_seeded,
    compare=_compare(_linear_loss),
    checked=_checked,
    tiny=_tiny,
    peak=_linear_peak,
    x="vocab",
)

OPS = (CROSS_ENTROPY, LINEAR)
