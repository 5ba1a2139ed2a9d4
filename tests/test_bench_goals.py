"""The goals of the benchmark suites: which there are, and whether a row reached them."""

import pytest
from bench_pools import row

from fusedformer.benchmarks import bench_tables, goals, gpu_suite, measure, suites
from fusedformer.benchmarks.ops import attention, common
from fusedformer.benchmarks.ops.registry import OPS

TINY = attention.Case(1, 2, 16, 8)


def goal(kind, at_least, aim=None):
    return {"kind": kind, "at_least": at_least, "aim": aim, "impl": "fused"}


@pytest.mark.parametrize(("factor", "said"), [(3.0, "no"), (4.5, "yes"), (5.0, "aim")])
def test_goals(factor, said):
    ours = row("fused", [1.0] * 3, goals=[goal("ratio", 4.0, 5.0)])
    (table,) = bench_tables.reach({"rows": [ours, row("sdpa", [factor] * 3)]})
    assert table.rows[0][-1] == said


def test_kinds_of_goals():
    dropped = TINY.at(dropout_p=0.1).as_dict()
    ours = row("fused", [2.0] * 3, case=dropped)
    data = {"rows": [ours, row("fused", [1.5] * 3)], "ceilings": {"copy_gbps": 2.0}}
    values = {kind: goals.value(kind, ours, data) for kind in ("tflops", "copy", "own")}
    assert values == pytest.approx({"tflops": 1.0, "copy": 0.25, "own": 0.75})
    assert goals.value("microseconds", ours, data) == 2000
    assert goals.value("ratio", ours, data) is None
    # The one kind where less is better.
    for at_most, aim, said in ((1000, None, "no"), (2000, 1000, "yes"), (3000, 2000, "aim")):
        assert goals.reached(goal("microseconds", at_most, aim), ours, data) == said
    assert goals.reached(goal("ratio", 1.0), ours, data) == "not measured"
    assert goals.reached(goal("tflops", None, 2.0), ours, data) == "not the aim"


def test_goals_against_the_best_of_torch_and_against_half_the_length():
    ours = row("fused-cuda", [2.0] * 3)
    theirs = [row("sdpa-cudnn", [3.0] * 3), row("sdpa-flash", [1.0] * 3), row("plain", [0.1] * 3)]
    assert goals.value("best", ours, {"rows": [ours, *theirs]}) == 0.5
    assert goals.value("best", ours, {"rows": [ours, theirs[2]]}) is None
    long, half = TINY.as_dict(), TINY.at(seq=TINY.seq // 2).as_dict()
    ours, before = (
        row("fused", quantity="memory", memory={"bytes": b, "returned": 0}, case=case)
        for b, case in ((200, long), (100, half))
    )
    assert goals.value("linear", ours, {"rows": [before, ours]}) == 2.0
    assert goals.reached(goal("linear", 2.1), ours, {"rows": [before, ours]}) == "yes"
    assert goals.reached(goal("linear", 1.9), ours, {"rows": [before, ours]}) == "no"


def test_the_gpu_suite_has_every_goal():
    """Each line of what the kernels are held to is a goal of an entry."""
    found = [
        (goal.impl, goal.kind, goal.at_least, goal.aim, entry.mode)
        for entry in suites.SUITES["gpu"](False, "cuda")
        for goal in entry.goals
    ]
    for wanted in (
        ("fused-triton", "tflops", 420, 480, "fwd"),
        ("fused-triton", "tflops", 320, 400, "bwd"),
        ("fused-triton", "ratio", 1.25, 1.4, "fwd_bwd"),
        ("fused-triton", "own", 0.80, 0.88, "fwd_bwd"),
        ("fused-triton", "own", 0.68, 0.78, "fwd_bwd"),
        ("fused-triton", "linear", 2.1, None, "fwd_bwd"),
        ("fused", "copy", 0.88, 0.92, "fwd"),
        ("fused", "copy", 0.75, 0.85, "bwd"),
        ("fused", "copy", 0.75, 0.80, "fwd"),
        ("fused", "copy", 0.60, 0.65, "fwd_bwd"),
        ("fused", "ratio", 1 / 1.15, 1 / 1.05, "fwd_bwd"),
        ("fused", "ratio", 8, 12, "fwd_bwd"),
        ("fused", "microseconds", 22, 15, "fwd"),
        ("fused", "microseconds", 30, 22, "fwd_grad"),
        ("fused-cuda", "ratio", 1.0, 1.05, "fwd"),
        ("fused-cuda", "tflops", None, 700, "fwd"),
        ("fused-cuda", "ratio", 0.95, 1.05, "bwd"),
        ("fused-cuda", "ratio", 0.97, 1.03, "fwd"),
        ("fused-cuda", "ratio", 0.97, 1.03, "bwd"),
        ("fused-cuda", "best", 1.0, 1.05, "fwd"),
        ("fused-cuda", "best", 1.0, 1.05, "bwd"),
        ("fused-cuda", "ratio", 1.6, 1.8, "fwd_bwd"),
        ("fused-cuda", "own", 0.85, 0.90, "fwd_bwd"),
        ("fused-cuda", "ratio", 1.4, 1.6, "fwd_bwd"),
        ("fused-cuda", "own", 0.70, 0.80, "fwd_bwd"),
    ):
        assert wanted in found


def test_the_gpu_suite_meets_every_kind_of_problem():
    """What has goals comes first; then other dimensions, dtypes, grouped heads, padding, ops."""
    asked = suites.SUITES["gpu"](False, "cuda")
    cases = [entry.case for entry in asked if entry.op == "attention"]
    assert {case.head_dim for case in cases} >= {32, 64, 96, 128, 192, 256}
    assert {case.dtype for case in cases} == {"bf16", "fp16", "fp32"}
    assert {case.group > 1 for case in cases} == {case.padded for case in cases} == {False, True}
    assert {entry.quantity for entry in asked} == {"time", "memory", "workspace", "overhead"}
    steps = {"gpt_step", "gpt_training", "transformer_step", "gpt_decode"}  # of the step `models`
    assert {entry.op for entry in asked} == set(OPS) - steps
    with_goals = [n for n, entry in enumerate(asked) if entry.goals]
    assert max(with_goals) < min(n for n, e in enumerate(asked) if e.op == "bias_activation")


def test_a_forced_backend_of_ours():
    """It is named as ours is, its mask is known, and on a CPU it is refused."""
    assert common.forced_backend("fused") is None
    assert common.forced_backend("fused-triton") == "triton"
    assert not common.ours("flex")
    dropped = TINY.at(dropout_p=0.5)
    assert measure._error_case(attention.OP, "fused-triton", dropped) == dropped
    assert "on a CPU" in measure.refusal(attention.OP, "fused-cuda", TINY)


def test_the_models_of_the_gpu_command_have_their_goals():
    gpt, base, _ = gpu_suite.trained(False, "cuda")
    (found,) = gpt.goals
    assert (found.kind, found.impl) == ("tflops", "fused-compile")
    assert (found.at_least / 989, found.aim / 989) == pytest.approx((0.41, 0.46))
    (found,) = base.goals
    assert (found.kind, found.at_least, found.aim) == ("ratio", 1.3, 1.5)
    assert {entry.baseline for entry in (gpt, base)} == {"compile"}
    assert gpt.case.dropout == base.case.dropout == 0.1
    assert not any(entry.goals for entry in gpu_suite.trained(True, "cuda"))


def test_the_cpu_suite_has_every_goal():
    asked = suites.SUITES["cpu"](False, "cpu")
    assert sum(len(entry.goals) for entry in asked) == 4 + 4 + 4 + 2 + 1 + 2 + 6 + 1
    assert not any(entry.goals for entry in suites.SUITES["cpu"](True, "cpu"))
    with pytest.raises(ValueError, match="--suite cpu is for a CPU"):
        suites.SUITES["cpu"](False, "cuda")


def test_the_models_suite_of_a_cpu_has_every_goal():
    asked = suites.SUITES["cpu-models"](False, "cpu")
    goals = {entry.title: entry.goals[0].at_least for entry in asked}
    assert len(goals) == len(asked) == 4 + 2 + 2 + 2
    assert goals["Transformer-base, training step, N = 1024, bf16"] == 5
    assert all(entry.case.dropout == 0.1 and len(entry.impls) == 2 for entry in asked)
    assert not any(entry.goals for entry in suites.SUITES["cpu-models"](True, "cpu"))
    with pytest.raises(ValueError, match="--suite cpu-models is for a CPU"):
        suites.SUITES["cpu-models"](False, "cuda")
