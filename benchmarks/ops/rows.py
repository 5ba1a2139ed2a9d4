"""What the ops on the rows of a matrix share: their problem, and errors in parts of rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedformer.benchmarks.ops import common
from fusedformer.benchmarks.ops.common import Distance, Held, Sizes
from fusedformer.kernels import rng


@dataclass(frozen=True)
class Case(Sizes):
    """One problem: a (rows, width) matrix."""

    rows: int
    width: int
    dtype: str = "fp32"
    dropout_p: float = 0.0
    device: str = "cpu"

    def matrix_bytes(self) -> float:
        """Bytes of one such matrix."""
        return float(self.rows * self.width * common.DTYPES[self.dtype].itemsize)


_BLOCK_ELEMENTS = 2**23  # of the truth at a time: 64 MiB a tensor


def checked(case: Case) -> Case:
    """The problem, or one of fewer rows: float64 is slow."""
    return case.at(rows=min(case.rows, max(64, 2**25 // case.width)))


def tiny(case: Case) -> Case:
    """A few rows of the problem."""
    return case.at(rows=min(case.rows, 4))


def moves(forward: float, backward: float) -> Callable[[Case, str], float]:
    """The bytes of an op that reads and writes so many matrices forward and backward."""
    return lambda case, mode: case.matrix_bytes() * common.cost(mode, forward, backward)


def compare_with(
    exact: Callable[..., Tensor], tag: int, matrices: int
) -> Callable[..., dict[str, float]]:
    """Op.compare of an op whose rows are independent, in parts of rows.

    Args:
        exact: (problem, keep, *args) -> output in float64; ``keep`` scales the elements: 0 where
            they are dropped, 1 / (1 - p) elsewhere.
        tag: of the op's dropout in rng.
        matrices: how many of the first arguments have rows; gradients of the others are summed.
    """

    def compare(
        case: Case,
        held: Held,
        out: Tensor,
        grads: "Sequence[Tensor] | None",
        seed: "int | None" = None,
    ) -> dict[str, float]:
        keep = torch.ones(1, 1, dtype=torch.float64, device=out.device)
        if seed is not None:
            at = rng.as_seed("compare", seed, out.device)
            keep = rng.rows_keep(at, case.dropout_p, case.rows, case.width, tag).double()
            keep /= 1 - case.dropout_p
        forward, backward = Distance(), [Distance() for _ in held.wanted()]
        sums = [torch.zeros(t.shape, dtype=torch.float64, device=t.device) for t in held.wanted()]
        block = max(1, _BLOCK_ELEMENTS // case.width)
        for start in range(0, case.rows, block):
            rows = slice(start, start + block)
            part = Held(
                [t[rows] if i < matrices else t for i, t in enumerate(held.args)], held.grad[rows]
            ).exact()
            truth = exact(case, keep[rows] if len(keep) > 1 else keep, *part.args)
            forward.add(out[rows], truth)
            if grads is None:
                continue
            exact_grads = common.backward_of(part)(truth)
            for i, (got, want) in enumerate(zip(grads, exact_grads, strict=True)):
                if i < matrices:
                    backward[i].add(got[rows], want)
                else:
                    sums[i] += want
        found = {"forward": forward.value()}
        if grads is not None:
            for i in range(matrices, len(grads)):
                backward[i].add(grads[i], sums[i])
            found["backward"] = max(distance.value() for distance in backward)
        return found

    return compare
