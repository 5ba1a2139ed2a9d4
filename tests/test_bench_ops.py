"""The ops as fusedformer bench knows them: right errors, wrong results, bytes and FLOPs, peers."""

import math

import pytest
import torch

from fusedformer.benchmarks import measure
from fusedformer.benchmarks.ops import attention, cross_entropy, models, rows
from fusedformer.benchmarks.ops.registry import OPS
from fusedformer.kernels import native

CASES = {
    attention.Case: [
        attention.Case(2, 4, 33, 8, "fp32"),
        attention.Case(2, 4, 33, 8, "bf16", causal=True, dropout_p=0.3, kv_heads=2, padded=True),
    ],
    rows.Case: [rows.Case(5, 33, "fp32"), rows.Case(5, 33, "bf16", 0.3)],
    cross_entropy.Case: [cross_entropy.Case(5, 33, 8), cross_entropy.Case(5, 33, 8, "bf16")],
}
COMPARED = [name for name, op in OPS.items() if op.compare]
TINY = attention.Case(1, 2, 16, 8)


@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("name", COMPARED)
def test_errors_of_right_results_are_below_the_limit(name, mode):
    op = OPS[name]
    for case in CASES[op.case]:
        limit = measure.limits(name, case, mode)
        for impl in ("fused", op.eager):
            found = measure.first(name, impl, case, mode, "")
            assert measure.verdict(found["error"], limit) is None
            assert (found["error"]["backward"] is None) == (mode == "fwd")
            compared = 0 if impl == "fused" else case.dropout_p
            assert found["error"]["case"] == ({"dropout_p": 0.0} if compared else {})


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("name", COMPARED)
def test_a_wrong_result_is_over_the_limit(name, part, monkeypatch):
    """A thousandth of one tensor that is off by its size is enough."""
    op, real = OPS[name], measure._run
    case = CASES[op.case][0]

    def spoilt(*args):
        out, grads = real(*args)
        wrong = (out if part == "forward" else grads[-1]).detach().clone()
        wrong[(-1,) * wrong.dim()] += max(1e-3, 1e-3 * float(wrong.norm()))
        return (wrong, grads) if part == "forward" else (out, (*grads[:-1], wrong))

    limit = measure.limits(name, case, "fwd_bwd")
    monkeypatch.setattr(measure, "_run", spoilt)
    found = measure.first(name, "fused", case, "fwd_bwd", "")
    assert f"relative error of the {part}" in measure.verdict(found["error"], limit)


def test_nan_is_wrong():
    assert measure.verdict({"forward": math.nan, "backward": None}, {"forward": 1.0})


def test_flops_and_bytes_by_hand():
    case = attention.Case(2, 8, 100, 64, "bf16", kv_heads=2)
    # Two products of (100 x 64)(64 x 100), two operations each multiply-add, 16 heads.
    assert attention.flops(case, "fwd") == 2 * 16 * 2 * 100 * 100 * 64
    assert attention.flops(case.at(causal=True), "fwd_bwd") == 3.5 * 2 * 16 * 100 * 100 * 64
    matrix = 2 * 100 * 64 * 2  # batch, length, dimension, bytes: one head of all sequences
    lse = 2 * 8 * 100 * 4
    assert attention.moved(case, "fwd") == (8 + 8 + 2 + 2) * matrix + lse
    assert attention.moved(case, "bwd") == (4 * 8 + 4 * 2) * matrix + lse
    norm = rows.Case(10, 16, "bf16")
    assert OPS["dropout_add_layer_norm"].moved(norm, "fwd_bwd") == (3 + 5) * 10 * 16 * 2
    assert OPS["layer_norm"].moved(norm, "bwd") == 3 * 10 * 16 * 2
    loss = cross_entropy.Case(10, 16, 4, "bf16")
    assert OPS["cross_entropy"].moved(loss, "fwd_bwd") == 3 * 10 * 16 * 2
    assert OPS["linear_cross_entropy"].flops(loss, "fwd") == 2 * 10 * 16 * 4


@pytest.mark.parametrize("name", COMPARED)
def test_eager_is_the_same_function(name):
    op = OPS[name]
    case = CASES[op.case][0]
    function = op.impls[op.eager].make(case)
    args = op.inputs(case, 3).args
    torch.testing.assert_close(function(*args), op.seeded(case)(*args), rtol=1e-4, atol=1e-5)


def test_decoding_writes_as_many_tokens_as_hugging_face():
    pytest.importorskip("transformers")
    case = models.sizes(True, "cpu")["gpt_decode"][0]
    shapes = {name: impl.make(case)().shape for name, impl in OPS["gpt_decode"].impls.items()}
    assert set(shapes.values()) == {(case.batch, case.seq)}


def test_x_transformers():
    pytest.importorskip("x_transformers.attend")
    for case in (TINY, TINY.at(causal=True)):
        found = measure.first("attention", "x-transformers", case, "fwd_bwd", "")
        assert measure.verdict(found["error"], measure.limits("attention", case, "fwd_bwd")) is None
    assert attention.IMPLS["x-transformers"].refuses(TINY.at(kv_heads=1)) == (
        "it takes no grouped heads"
    )


@pytest.mark.parametrize("name", ["flash-attn-2", "xformers", "transformer-engine"])
def test_a_peer_that_is_missing_says_so(name):
    impl = attention.IMPLS[name]
    if impl.version() is None:
        assert impl.refuses(TINY.at(dtype="bf16")).endswith("is not installed")


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("dropout", rows.Case(2, 3, dropout_p=0.5)),
        # These take a shorter way to the CPU's kernels.
        ("attention", TINY),
        ("layer_norm", rows.Case(2, 3)),
    ],
)
def test_a_row_says_what_ran(op, case):
    wanted = "reference (not fused)" if native.library()[1] else "fused (cpu)"
    for mode in ("fwd", "fwd_bwd"):
        assert measure.first(op, "fused", case, mode, "")["label"] == wanted


