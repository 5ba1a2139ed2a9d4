"""Dropout alone, and bias + GELU + dropout.

Bytes are whole matrices: both read x and write y; dropout's backward reads dy and writes dx,
bias_activation's reads x as well. FLOPs are not counted: bandwidth bounds these ops.
"""

import functools
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

import fusedformer
from fusedformer.benchmarks.ops import common, rows
from fusedformer.benchmarks.ops.common import Held, Impl, Op
from fusedformer.benchmarks.ops.rows import Case
from fusedformer.kernels import rng


def _op(
    name: str, formula: Callable, exact: Callable, own: Callable, tag: int, reads: int
) -> Op:  # fmt: skip
    """An op of x, and of a bias if ``reads`` says that the backward reads x."""
    has_bias = reads > 1

    def inputs(case: Case, seed: int = 0) -> Held:
        generator = common.generator(case, seed)
        size = (case.rows, case.width)
        args = [common.random(generator, size, case)]
        if has_bias:
            args.append(common.random(generator, size[1:], case))
        return Held([t.requires_grad_() for t in args], common.random(generator, size, case))

    def seeded(
        case: Case, seed: "int | None" = None, backend: "str | None" = None
    ) -> Callable[..., Tensor]:
        return functools.partial(own(case.dropout_p), seed=seed, backend=backend)

    return Op(
        name=name,
        case=Case,
        inputs=inputs,
        impls={
            "fused": Impl(f"fusedformer.{name}", seeded),
            "eager": Impl(
                "the formula in eager PyTorch",
                lambda case: functools.partial(formula, dropout_p=case.dropout_p),
            ),
            "compile": Impl(
                "torch.compile of eager",
                lambda case: functools.partial(common.compiled(formula), dropout_p=case.dropout_p),
                compiles=True,
            ),
        },
        eager="eager",
        flops=lambda case, mode: 0.0,
        moved=rows.moves(2, 1 + reads),
        seeded=seeded,
        compare=rows.compare_with(exact, tag, matrices=1),
        checked=rows.checked,
        tiny=rows.tiny,
        peak=lambda impl, case: 6 * 4.0 * case.rows * case.width,
        x="width",
    )


def _dropout(x: Tensor, *, dropout_p: float) -> Tensor:
    return functional.dropout(x, dropout_p)


def _bias_gelu(x: Tensor, bias: Tensor, *, dropout_p: float) -> Tensor:
    return functional.dropout(functional.gelu(x + bias), dropout_p)


OPS = (
    _op(
        "dropout",
        _dropout,
        lambda case, keep, x: x * keep,
        lambda p: functools.partial(fusedformer.dropout, p=p),
        rng.DROPOUT,
        reads=1,
    ),
    _op(
        "bias_activation",
        _bias_gelu,
        lambda case, keep, x, bias: functional.gelu(x + bias) * keep,
        lambda p: functools.partial(fusedformer.bias_activation, dropout_p=p),
        rng.BIAS_ACTIVATION,
        reads=2,
    ),
)
