"""The attention profile: what it measures, rows for what cannot run, its files."""

import json
import os
import re
import signal
import sys
import time

import pytest
import torch

from fusedformer import cli
from fusedformer.benchmarks import (
    ceilings,
    document,
    memory,
    page,
    points,
    profile,
    providers,
    results,
    sweep,
    tables,
    terminal,
    workers,
)
from fusedformer.benchmarks.ops import attention, common
from fusedformer.benchmarks.ops.attention import Case

TINY = ["--device", "cpu", "--seq", "16,32", "--heads", "2", "--head-dim", "8"]
TINY += ["--head-dim-sweep", "16", "--head-dim-seq", "16"]
PLAIN = ["--impl", "plain", "--dropout", "0", "--causal", "no"]


@pytest.fixture(scope="module", autouse=True)
def few_passes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "PASSES", 2)
        # They take seconds; the workers get a function that fails at once.
        patch.setattr(ceilings, "measure", dict)
        yield


def run(tmp_path, *argv: str) -> dict:
    assert cli.main(["profile", "attention", *TINY, "--out", str(tmp_path), *argv]) == 0
    return json.loads((tmp_path / "attention.json").read_text())


# --- Implementations ------------------------------------------------------------------------------


def test_reference_is_never_called_fused():
    assert providers.label("fused", "reference") == "reference (not fused)"
    assert providers.label("fused", "triton") == "fused (triton)"
    assert providers.label("fused", "cpu") == "fused (cpu)"


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_backend_is_the_one_that_runs(dropout_p, monkeypatch):
    from fusedformer.kernels import dispatch

    case = Case(1, 2, 16, 8, dropout_p=dropout_p)
    held = attention.inputs(case)
    ran = []
    pick = dispatch.pick
    monkeypatch.setattr(
        dispatch, "pick", lambda *args: ran.append(pick(*args).__name__) or pick(*args)
    )
    said = providers.backend("fused", case, held.args)
    forward, backward = providers.call("fused", case, held)
    backward(forward())
    assert len(set(ran)) == 1
    assert said in dispatch.BACKENDS
    assert dispatch.BACKENDS[said].format(file=dispatch.OPS["attention"]) == ran[0]


@pytest.mark.parametrize("dtype", common.DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("impl", providers.IMPLS)
def test_implementations_agree_with_float64(impl, causal, dtype):
    errors = providers.error_of(impl, Case(1, 2, 33, 8, dtype=dtype, causal=causal))
    bound = 20 * torch.finfo(common.DTYPES[dtype]).eps
    assert 0 < errors["forward"] < bound
    assert 0 < errors["backward"] < bound


def test_errors_with_dropout():
    case = Case(1, 2, 33, 8, dropout_p=0.3)
    assert providers.error_of("plain", case) is None
    assert providers.error_of("fused", case)["backward"] < 1e-5


# --- Memory and processes -------------------------------------------------------------------------


def _touch(mebibytes: int) -> dict:
    torch.ones(2**20, dtype=torch.uint8)  # the tiny warm-up: threads and code
    meter = memory.PeakMeter("cpu")
    held = torch.ones(mebibytes * 2**20, dtype=torch.uint8)
    del held
    return {"extra": meter.extra()}


def _exhaust() -> None:
    torch.empty(2**62, dtype=torch.uint8)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fail() -> None:
    raise RuntimeError("the first line\nthe second")


def test_peak_memory_of_a_known_allocation():
    with workers.Workers(fresh=True) as pool:
        extra = [pool.run(_touch, size).value["extra"] for size in (200, 10, 200)]
    assert extra == pytest.approx([200 * 2**20, 10 * 2**20, 200 * 2**20], abs=2 * 2**20)


@pytest.mark.parametrize("fresh", [True, False])
def test_workers_survive_what_they_run(fresh):
    with workers.Workers(fresh) as pool:
        assert pool.run(_exhaust).status == workers.OUT_OF_MEMORY
        failed = pool.run(_fail)
        assert (failed.status, failed.reason) == (workers.FAILED, "RuntimeError: the first line")
        if hasattr(signal, "SIGKILL"):
            died = pool.run(_die)
            assert died.status == workers.OUT_OF_MEMORY
            assert "killed" in died.reason
        assert pool.run(os.getpid).value != os.getpid()


def test_a_call_that_takes_too_long_is_ended():
    with workers.Workers(fresh=True) as pool:
        outcome = pool.run(time.sleep, 60, timeout=0.1)
        assert (outcome.status, outcome.reason) == (workers.TOO_SLOW, "not done after 0 s")
        assert pool.run(abs, -1).value == 1


def test_what_does_not_fit_is_a_row(monkeypatch):
    class Pool:
        """Has a backend for everything, 1 GB of memory, and never runs."""

        def run(self, function, *args, timeout):
            assert function is points.look
            backends = {"fused": "reference", "plain": "eager", "sdpa": "flash"}
            return workers.Outcome(workers.OK, ({i: backends[i] for i in args[0]}, 10**9))

    plan = [sweep.Point("seq", Case(1, 8, 2**20, 64))]
    walk = sweep.Sweep(["fused", "plain"], Pool(), budget=100)
    list(walk.run(plan, lambda *_: None))
    assert [row["status"] for row in walk.rows] == [sweep.DOES_NOT_FIT] * 2
    assert re.fullmatch(r"needs about [\d.]+ GB; 1.0 GB are available", walk.rows[0]["reason"])
    assert "forward_ms" not in walk.rows[0]


def test_a_spent_budget_is_a_row():
    with workers.Workers(fresh=True) as pool:
        walk = sweep.Sweep(["plain"], pool, budget=100)
        plan = [sweep.Point("seq", Case(1, 1, n, 8)) for n in (16, 2**20)]
        started = walk.run(plan, lambda *_: None)
        next(started)
        walk.budget = 0
        list(started)
    assert [row["status"] for row in walk.rows] == [workers.OK, sweep.OVER_BUDGET]
    assert walk.rows[1]["reason"] == "the 0 s were spent before"


def test_later_passes_add_samples():
    with workers.Workers(fresh=True) as pool:
        walk = sweep.Sweep(["plain", "sdpa"], pool, budget=100)
        passes = []
        plan = [sweep.Point("seq", Case(1, 1, n, 8)) for n in (16, 32)]
        list(walk.run(plan, lambda number, _: passes.append(number)))
    assert passes == [n for n in range(1, sweep.PASSES + 1) for _ in plan]
    assert all(len(row["forward_ms"]["samples"]) >= sweep.PASSES for row in walk.rows)


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    return folder, run(folder)


def test_json(whole_run):
    _, found = whole_run
    assert found["schema_version"] == document.SCHEMA_VERSION
    assert found["state"] == "complete"
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["rng_version"] >= 1
    assert len(found["rows"]) == 3 * (1 + 2 * 4)
    for row in found["rows"]:
        assert row["status"] == workers.OK
        for phase in ("forward_ms", "backward_ms"):
            held = row[phase]
            assert 0 < held["p20"] <= held["median"] <= held["p80"]
            assert len(held["samples"]) >= sweep.PASSES
        assert row["memory"]["training_bytes"] >= row["memory"]["forward_bytes"] >= 0
        assert not (row["backend"] == "reference" and row["label"].startswith("fused"))
    assert all(not law["fitted"] and "5 are needed" in law["reason"] for law in found["fits"])
    with_error = {(e["impl"], e["dropout_p"]) for e in found["errors"]}
    assert with_error == {("fused", 0), ("sdpa", 0), ("plain", 0), ("fused", 0.1)}


def test_page_is_self_contained(whole_run):
    folder, found = whole_run
    html = (folder / "attention.html").read_text()
    assert not re.search(r"<script|<link[^>]+href=\"(?!data:)|src=|url\((?!#)|@import", html)
    assert not re.search(r"https?://(?!www\.w3\.org/)", html)  # XML namespaces are only names
    assert "prefers-color-scheme" in html
    assert 'name="viewport"' in html
    for row in found["rows"]:
        assert row["label"] in html
    if "<svg" in html:
        assert html.count("<svg") == 2 * 4 + 2  # time and memory of each variant, and over d
        ids = re.findall(r'\bid="([^"]+)"', html)
        assert len(ids) == len(set(ids))


def test_chart(whole_run):
    pytest.importorskip("matplotlib")
    folder, _ = whole_run
    assert (folder / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_charts_say(monkeypatch, tmp_path):
    """The fitted exponents, and in the roofline every forward without dropout."""
    pytest.importorskip("matplotlib")
    from fusedformer.benchmarks import charts, profile_charts

    rows = [
        Case(1, 1, n, 64, dropout_p=p).as_dict()
        | {"sweep": "seq", "impl": "plain", "label": "plain", "status": "ok"}
        | {"forward_ms": {"median": n * n / 1e3}, "memory": {"training_bytes": 2**20 * n}}
        for n in (64, 128, 256, 512, 1024)
        for p in (0.0, 0.1)
    ]
    ceilings = {"matmul_tflops": {"fp32": 0.002, "fp16": None}, "copy_gbps": 1.0}
    document = {"rows": rows, "fits": results.fits(rows), "ceilings": ceilings}
    figures = []
    monkeypatch.setattr(charts.Figure, "savefig", lambda self, path, dpi: figures.append(self))
    profile_charts.png(document, "", tmp_path / "x.png")
    times, _, memory, _, roof = figures[0].axes
    for axes, said in ((times, "plain: N^2.00"), (memory, "plain: N^1.00")):
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [said]
    # 4 N^2 d operations in N^2 microseconds are 256 of them in each.
    heights = [line.get_ydata()[0] for line in roof.lines if line.get_marker() == "^"]
    assert heights == pytest.approx([4 * 64 / 1e6] * 5)
    assert profile_charts.roofline(document | {"ceilings": None}) is None


def test_terminal(tmp_path, capsys):
    run(tmp_path, *PLAIN)
    said = capsys.readouterr().out
    assert "plain (eager)" in said
    assert re.search(r"not fitted: \d of 2 points over 1 ms; 5 are needed", said)
    assert "attention.json" in said


def test_without_matplotlib_and_rich(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    from fusedformer import benchmarks

    for name in ("charts", "profile_charts"):
        monkeypatch.delitem(sys.modules, f"fusedformer.benchmarks.{name}", raising=False)
        monkeypatch.delattr(benchmarks, name, raising=False)
    monkeypatch.setattr(terminal, "HAS_RICH", False)
    found = run(tmp_path, *PLAIN)
    assert not (tmp_path / "attention.png").exists()
    assert "matplotlib is not installed" in (tmp_path / "attention.html").read_text()
    assert [line.split()[-4] for line in found["left_out"]] == ["(matplotlib", "(rich"]
    said = capsys.readouterr().out
    assert "Left out: the PNG chart" in said
    assert "Full, no dropout: over sequence length N" in said


def test_text_sets_the_sweep_and_the_weights(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("x" * n for n in (8, 8, 8, 24, 60)))
    argv = ["profile", "attention", "--device=cpu", "--heads=1", "--head-dim=8"]
    assert cli.main([*argv, *PLAIN, f"--text={text}", f"--out={tmp_path}"]) == 0
    found = json.loads((tmp_path / "attention.json").read_text())
    assert [part["count"] for part in found["text"]["bins"]] == [3, 1, 1]
    assert {row["seq"] for row in found["rows"]} == {8, 24, 60}
    medians = {
        row["seq"]: row["forward_ms"]["median"] + row["backward_ms"]["median"]
        for row in found["rows"]
    }
    total = found["text_totals"][0]
    assert total["seconds"] * 1e3 == pytest.approx(3 * medians[8] + medians[24] + medians[60])
    said = capsys.readouterr().out
    assert "counted in UTF-8 bytes" in said
    assert "5 paragraphs" in said


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision(tmp_path, dtype):
    found = run(tmp_path, f"--dtype={dtype}", "--causal=yes", "--head-dim-sweep=0", "--seq=16")
    assert {row["status"] for row in found["rows"]} == {workers.OK}
    assert {row["dtype"] for row in found["rows"]} == {dtype}


@pytest.mark.parametrize("points_done", [0, 4])
def test_interrupt_keeps_what_was_measured(points_done, tmp_path, monkeypatch):
    whole = sweep.Sweep.run

    def cut(self, plan, before):
        for index, _ in enumerate(whole(self, plan[:points_done], before), 1):
            yield
            if index == points_done:
                break
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep.Sweep, "run", cut)
    assert cli.main(["profile", "attention", *TINY, "--out", str(tmp_path)]) == profile.INTERRUPTED
    found = json.loads((tmp_path / "attention.json").read_text())
    assert found["state"] == "interrupted"
    assert len(found["rows"]) == points_done * 3
    assert "Interrupted" in (tmp_path / "attention.html").read_text()


@pytest.mark.parametrize(("load", "said"), [(0.3, False), (5.0, True), (None, False)])
def test_a_busy_machine_is_said(load, said):
    document = {"environment": {"load": load, "logical_cores": 4}}
    assert (page.busy(document) is not None) == said


def test_exponent_notes_are_said_once():
    law = {"sweep": "seq", "impl": "plain", "causal": False, "dropout_p": 0.0, "label": "plain"}
    fitted = {"fitted": True, "exponent": 2.0, "low": 1.9, "high": 2.1, "used": [1, 2, 3, 4, 5]}
    names = ("forward_ms", "backward_ms", "training_bytes")
    document = {"fits": [law | {"quantity": name} | fitted for name in names]}
    (table,) = tables.exponents(document, "seq")
    assert table.rows == [["full, no dropout", "plain", *["2.00 (1.90 to 2.10) [a]"] * 3]]
    assert table.notes == ("[a] fitted on N = 1, 2, 3, 4, 5",)


def test_crossing_points():
    def points(seq, forward, training):
        row = {"sweep": "seq", "seq": seq, "causal": False, "dropout_p": 0.0, "status": "ok"}
        for impl, ms, held in (("fused", *forward), ("plain", *training)):
            yield row | {
                "impl": impl, "label": impl, "forward_ms": {"median": ms},
                "backward_ms": {"median": ms}, "memory": {"training_bytes": held},
            }  # fmt: skip

    rows = [*points(128, (4.0, 10.0), (1.0, 20.0)), *points(512, (8.0, 10.0), (32.0, 40.0))]
    found = {law["quantity"]: law for law in results.crossings(rows)}
    # Straight lines through the logarithms: 4 -> 8 and 1 -> 32 meet at 256.
    assert found["time"]["kind"] == "at"
    assert found["time"]["x"] == pytest.approx(256)
    assert (found["memory"]["kind"], found["memory"]["x"]) == ("from the first", 128)
    (table,) = tables.crossings({"crossings": list(found.values())})
    assert table.rows == [["full, no dropout", "plain", "N = 256", "from the first, 128"]]


def test_intensity_by_hand():
    """One head of 64, N = 64: 4 N^2 d operations over 4 N d + N fp32 numbers."""
    row = Case(1, 1, 64, 64).as_dict() | {"sweep": "seq", "label": "x", "forward_ms": {"median": 1}}
    ceilings = {"matmul_tflops": {"fp32": 0.002}, "copy_gbps": 1.0}
    document = {"options": {"dtype": "fp32"}, "ceilings": ceilings, "rows": [row]}
    (table,) = tables.intensity(document)
    per_byte = 4 * 64**2 * 64 / (4 * (4 * 64 * 64 + 64))
    assert table.rows == [["full, no dropout", "x", "64", f"{per_byte:.3g}", "0.001", "52%"]]
    assert tables.intensity(document | {"ceilings": None}) == []
