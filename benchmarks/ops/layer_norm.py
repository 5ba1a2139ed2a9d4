"""Layer norm, with dropout and the residual in the same pass, and RMS norm.

Bytes are whole matrices: dropout_add_layer_norm reads x and the residual and writes y; its
backward reads dy, x and the residual and writes dx and dresidual. The norms alone read x and write
y; backward they read dy and x and write dx. FLOPs are not counted: bandwidth bounds these ops.
"""

import functools
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

import fusedformer
from fusedformer.benchmarks.ops import common, row_peers, rows
from fusedformer.benchmarks.ops.common import Held, Impl, Op
from fusedformer.benchmarks.ops.rows import Case
from fusedformer.kernels import rng

_EPS = 1e-5


# --- Inputs ---------------------------------------------------------------------------------------


def _inputs(case: Case, seed: int, *, matrices: int, vectors: int) -> Held:
    generator = common.generator(case, seed)
    size = (case.rows, case.width)
    args = [common.random(generator, size, case) for _ in range(matrices)]
    args += [common.random(generator, size[1:], case, 0.5) for _ in range(vectors)]
    return Held([t.requires_grad_() for t in args], common.random(generator, size, case))


# --- dropout_add_layer_norm -----------------------------------------------------------------------


def _eager_add(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, dropout_p: float
) -> Tensor:
    z = residual + functional.dropout(x, dropout_p)
    return functional.layer_norm(z, z.shape[-1:], weight, bias, _EPS)


def _exact_add(
    case: Case, keep: Tensor, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    z = residual + x * keep
    return functional.layer_norm(z, z.shape[-1:], weight, bias, _EPS)


def _seeded_add(
    case: Case, seed: "int | None" = None, backend: "str | None" = None
) -> Callable[..., Tensor]:
    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = fusedformer.dropout_add_layer_norm(
            x, residual, weight, bias, case.dropout_p, _EPS, seed=seed, backend=backend
        )
        assert isinstance(y, Tensor)  # a pair only with prenorm
        return y

    return call


def _eager(function: Callable, case: Case) -> Callable[..., Tensor]:
    return functools.partial(function, dropout_p=case.dropout_p)


def _compiled(function: Callable, case: Case) -> Callable[..., Tensor]:
    return functools.partial(common.compiled(function), dropout_p=case.dropout_p)


def _peak(matrices: int) -> Callable[[str, Case], float]:
    # In float32, which a formula may hold its steps in.
    return lambda impl, case: 4.0 * matrices * case.rows * case.width


ADD = Op(
    name="dropout_add_layer_norm",
    case=Case,
    inputs=functools.partial(_inputs, matrices=2, vectors=2),
    impls={
        "fused": Impl("fusedformer.dropout_add_layer_norm", _seeded_add),
        "eager": Impl(
            "layer_norm(residual + dropout(x)) in eager PyTorch",
            functools.partial(_eager, _eager_add),
        ),
        "compile": Impl(
            "torch.compile of eager", functools.partial(_compiled, _eager_add), compiles=True
        ),
        **row_peers.ADD_NORM,
    },
    eager="eager",
    flops=lambda case, mode: 0.0,
    moved=rows.moves(3, 5),
    seeded=_seeded_add,
    compare=rows.compare_with(_exact_add, rng.DROPOUT_ADD_NORM, matrices=2),
    checked=rows.checked,
    tiny=rows.tiny,
    peak=_peak(8),
    x="width",
)


# --- The norms alone ------------------------------------------------------------------------------


def _norm_op(
    name: str, function: Callable[..., Tensor], own: Callable, vectors: int, peers: dict[str, Impl]
) -> Op:
    """An op of one matrix; ``function`` is its formula, ``own`` this project's."""

    def seeded(
        case: Case, seed: "int | None" = None, backend: "str | None" = None
    ) -> Callable[..., Tensor]:
        return functools.partial(own, eps=_EPS, backend=backend)

    return Op(
        name=name,
        case=Case,
        inputs=functools.partial(_inputs, matrices=1, vectors=vectors),
        impls={
            "fused": Impl(f"fusedformer.{name}", seeded),
            "eager": Impl(f"torch.nn.functional.{name}", lambda case: function),
            "compile": Impl(
                "torch.compile of eager", lambda case: common.compiled(function), compiles=True
            ),
            **peers,
        },
        eager="eager",
        flops=lambda case, mode: 0.0,
        moved=rows.moves(2, 3),
        seeded=seeded,
        compare=rows.compare_with(lambda case, keep, *args: function(*args), 0, matrices=1),
        checked=rows.checked,
        tiny=rows.tiny,
        peak=_peak(6),
        x="width",
    )


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], weight, bias, _EPS)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], weight, _EPS)


LAYER_NORM = _norm_op("layer_norm", _layer_norm, fusedformer.layer_norm, 2, row_peers.LAYER_NORM)
RMS_NORM = _norm_op("rms_norm", _rms_norm, fusedformer.rms_norm, 1, row_peers.RMS_NORM)
OPS = (ADD, LAYER_NORM, RMS_NORM)
