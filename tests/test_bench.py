"""fusedformer bench: what it measures, what it flags, rows for what fails, its files."""


import contextlib

import pytest
from bench_pools import Inline, row

from fusedformer import cli
from fusedformer.benchmarks import (
    bench_options,
    bench_tables,
    ceilings,
    document,
    entries,
    measure,
    metrics,
    points,
    runner,
    suites,
    workers,
)
from fusedformer.benchmarks.entries import Entry
from fusedformer.benchmarks.ops import attention, common, models
from fusedformer.benchmarks.ops.common import Impl
from fusedformer.benchmarks.ops.registry import OPS
from fusedformer.benchmarks.workers import Outcome

TINY = attention.Case(1, 2, 16, 8)
QUICK = runner.Limits(seconds=0.01, max_rounds=3)


def measured(asked, failures=None, before=lambda function, args: None, limits=QUICK, kept=()):
    with runner.Runner("cpu", limits, list(kept)) as held:
        held._pools[""] = Inline(failures, before)
        list(held.run(asked, lambda entry: None))
        return held.rows


# --- Rows -----------------------------------------------------------------------------------------


def test_rows():
    entry = Entry("attention", TINY, "fwd_bwd", impls=("fused", "sdpa", "plain"))
    found = measured([entry])
    assert [held["impl"] for held in found] == ["fused", "sdpa", "plain"]
    for held in found:
        assert held["status"] == workers.OK
        ms = held["ms"]
        assert 0 < ms["p20"] <= ms["median"] <= ms["p80"]
        assert len(ms["samples"]) == 3
        assert 0 < held["error"]["backward"] < 1e-5
        assert held["flops"] == attention.flops(TINY, "fwd_bwd")
        assert held["key"] == entry.key()
    assert {held["key"] for held in measured([entry.at(mode="fwd")])} != {entry.key()}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_models(compiled):
    for op, cases in models.sizes(True, "cpu").items():
        impls = OPS[op].impls.items()
        names = [n for n, impl in impls if impl.compiles == compiled and n != "hugging-face"]
        if not names:
            continue
        found = measured([Entry(op, case, models.STEP, impls=tuple(names)) for case in cases])
        assert [row["status"] for row in found] == [workers.OK] * len(names)
        assert all(row["ms"]["median"] > 0 for row in found)
        assert found[0]["error"]["forward"] is None


def _impl(function, **options):
    return Impl("for a test", lambda case: function, **options)


def test_a_wrong_implementation_is_flagged_and_its_speed_withheld(monkeypatch):
    def wrong(query, key, value):
        return attention.plain_attention(query, key, value) * 1.001

    monkeypatch.setitem(OPS["attention"].impls, "wrong", _impl(wrong))
    right, flagged = measured([Entry("attention", TINY, "fwd", impls=("sdpa", "wrong"))])
    assert right["status"] == workers.OK
    assert flagged["status"] == runner.WRONG
    assert "relative error of the forward 1.0e-03" in flagged["reason"]
    assert "ms" not in flagged


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Outcome(workers.OUT_OF_MEMORY, reason="the process was killed"), workers.OUT_OF_MEMORY),
        (Outcome(workers.FAILED, reason="the process ended with exit code -11"), workers.FAILED),
        (Outcome(workers.TOO_SLOW, reason="not done after 9 s"), workers.TOO_SLOW),
    ],
)
def test_a_peer_that_dies_is_a_row(outcome, status):
    entry = Entry("attention", TINY, "fwd", impls=("plain", "sdpa"))
    died, fine = measured([entry], {"plain": outcome})
    assert (died["status"], died["reason"]) == (status, outcome.reason)
    assert fine["status"] == workers.OK
    assert "ms" in fine


def test_a_peer_that_raises_is_a_row(monkeypatch):
    calls = []

    def fails_later(query, key, value):
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("later")
        return attention.plain_attention(query, key, value)

    monkeypatch.setitem(OPS["attention"].impls, "fragile", _impl(fails_later))
    failed, fine = measured([Entry("attention", TINY, "fwd", impls=("fragile", "plain"))])
    assert (failed["status"], failed["reason"]) == (workers.FAILED, "RuntimeError: later")
    assert len(fine["ms"]["samples"]) == 3


def test_what_is_not_here_is_a_row():
    (row,) = measured([Entry("attention", TINY, "fwd", impls=("sdpa-cudnn",))])
    assert row["status"] == runner.NOT_HERE
    assert "on a CPU" in row["reason"]


def test_what_does_not_fit_is_a_row():
    case = attention.Case(1, 8, 2**20, 64)

    def refuse(function, args):
        assert function in (measure.look, measure.limits), "nothing of this size may run"
        if function is measure.limits:
            raise AssertionError

    with pytest.raises(AssertionError):
        measured([Entry("attention", case, "fwd", impls=("plain",))], before=refuse)
    failures = {"attention": Outcome(workers.OK, ({"plain": None}, 10**9))}
    (row,) = measured([Entry("attention", case, "fwd", impls=("plain",))], failures)
    assert row["status"] == runner.DOES_NOT_FIT
    assert row["reason"].endswith("1.0 GB are available")


def test_a_spent_budget_is_a_row():
    limits = runner.Limits(budget=1e-9)
    (row,) = measured([Entry("attention", TINY, "fwd", impls=("plain",))], limits=limits)
    assert row["status"] == runner.OVER_BUDGET


def test_a_budget_that_ends_within_an_entry_is_not_the_implementations_fault():
    """And the whole entry is measured again by the next run."""
    slow = Outcome(workers.TOO_SLOW, reason="not done after 1 s")
    entry = Entry("attention", TINY, "fwd", impls=("plain", "sdpa"))
    limits = runner.Limits(0.01, 3, 3, call=300.0, budget=60.0)
    cut, fine = measured([entry], {"plain": slow}, limits=limits)
    assert (cut["status"], fine["status"]) == (runner.OVER_BUDGET, workers.OK)
    other = row("fused", [1.0], key="other")
    assert runner.worth_keeping([cut, fine, other]) == [other]
    limits = runner.Limits(0.01, 3, 3, call=5.0, budget=60.0)
    assert measured([entry], {"plain": slow}, limits=limits)[0]["status"] == workers.TOO_SLOW


def test_rows_of_a_run_before_are_kept():
    both = [Entry("attention", TINY.at(seq=n), "fwd", impls=("plain",)) for n in (8, 16)]
    before = measured(both[:1])
    asked = []
    after = measured(both, before=lambda function, args: asked.append(args), kept=before)
    assert after[0] is before[0]
    assert [row["case"]["seq"] for row in after] == [8, 16]
    assert all("seq=8" not in str(args) for args in asked)


# --- Metrics and tables ---------------------------------------------------------------------------


def test_ratio_is_of_rounds():
    """A slow phase that both meet leaves the ratio as it is."""
    ours, base = row("fused", [1.0, 10.0, 1.0]), row("sdpa", [4.0, 50.0, 6.0])
    assert metrics.ratio(ours, base)["median"] == 5.0
    assert metrics.ratio(ours, None) is None
    assert metrics.ratio(row("fused"), base) is None
    memory = [{"bytes": n + 2, "returned": 2} for n in (2, 398)]
    for quantity, ratio in (("memory", 100), ("workspace", 199)):
        small, large = ({"memory": held, "quantity": quantity} for held in memory)
        assert metrics.ratio(row("fused", **small), row("sdpa", **large))["median"] == ratio


def test_metrics_by_hand():
    held = row("fused", [2.0] * 3, memory={"bytes": 3 * 2**20, "returned": 0})
    values = {name: metric.value(held, None) for name, metric in metrics.METRICS.items()}
    assert values["latency"] == 2.0
    assert values["tflops"] == pytest.approx(1.0)
    assert values["gbps"] == pytest.approx(0.5)
    assert values["memory"] == 3.0
    assert values["speedup"] is None


def test_csv():
    data = {"rows": [row("fused", [1.0] * 3), row("sdpa", status="failed", reason="a, b")]}
    lines = bench_tables.csv_text(data, ("latency", "speedup")).splitlines()
    assert lines[0].endswith("impl,label,version,latency,speedup,status,reason")
    assert lines[1].endswith("fused,fused,,1.0,,ok,")
    assert lines[2].endswith('sdpa,sdpa,,,,failed,"a, b"')


def test_what_hangs_on_a_gpu_is_left_out_of_further_problems():
    """Alone, it is told apart; timed beside others, these are timed again without it."""
    slow = Outcome(workers.TOO_SLOW, reason="not done after 75 s")
    names = ("fused-triton", "fused-cuda", "sdpa")
    asked = [Entry("attention", TINY.at(seq=n), "fwd", impls=names) for n in (16, 32)]
    calls = []

    class Pool(contextlib.nullcontext):
        def run(self, function, op, *args, timeout=None):
            calls.append((function.__name__, args[0]))
            if function is measure.look:
                return Outcome(workers.OK, (dict.fromkeys(names), None))
            if function is measure.limits:
                return Outcome(workers.OK, {"forward": 1.0})
            if function is measure.first:
                error = {"forward": 0.0, "backward": None}
                return Outcome(workers.OK, {"label": "", "memory": {}, "error": error})
            assert function is measure.times
            if "fused-cuda" in args[0]:
                return slow
            times = Outcome(workers.OK, {"ms": [1.0]})
            return Outcome(workers.OK, dict.fromkeys(args[0], times))

    with runner.Runner("cuda", QUICK) as held:
        held._pools[""] = Pool()
        list(held.run(asked, lambda entry: None))
    statuses = [(row["impl"], row["status"]) for row in held.rows]
    assert statuses[:3] == [("fused-triton", "ok"), ("fused-cuda", "too slow"), ("sdpa", "ok")]
    assert statuses[3:] == [("fused-triton", "ok"), ("fused-cuda", runner.NOT_HERE), ("sdpa", "ok")]
    assert "N = 16" in held.rows[4]["reason"]
    assert [names for what, names in calls if what == "times"] == [
        ["fused-triton", "fused-cuda", "sdpa"], ["fused-triton", "sdpa"], ["fused-triton", "sdpa"],
    ]  # fmt: skip


# --- Suites and the command -----------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(
    ("name", "device"),
    [
        (name, device)
        for name in suites.SUITES
        for device in ("cpu", "cuda")
        if not (name.startswith("cpu") and device == "cuda")
    ],
)
def test_suites_name_what_there_is(name, device, quick):
    asked = suites.SUITES[name](quick, device)
    assert len({entry.key() for entry in asked}) == len(asked)
    assert len({entry.named() for entry in asked}) == len(asked)
    for entry in asked:
        op = OPS[entry.op]
        assert set(entry.impls) <= set(op.impls)
        assert (entry.baseline or entries.default_baseline(entry.op)) in op.impls
        assert isinstance(entry.case, op.case)
        assert entry.case.device == device


def test_list(capsys, monkeypatch):
    monkeypatch.setattr(common, "no_compiler", lambda device: "no compiler today")
    assert cli.main(["bench", "--list", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for name in OPS:
        assert name in said
    assert "no compiler today" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--op=attentoin"], "--op got 'attentoin'; it wants one of attention"),
        (["--suite=cpu", "--op=attention"], "--suite and --op both"),
        (["--seq=12"], "--seq goes with --op alone"),
        (["--suite=rows", "--kv-heads=2"], "--kv-heads goes with --op alone"),
        (["--suite=nosuch"], "--suite got 'nosuch'"),
        (["--op=attention", "--mode=forward"], "--mode got 'forward'"),
        (["--only=sdpa,best"], "--only got 'best'"),
        (["--metrics=speed"], "--metrics got 'speed'"),
        (["--op=attention", "--seq=0"], "--seq got '0'"),
        (["--min-rounds=0"], "--min-rounds got '0'"),
        (["--match=nothing"], "--match got 'nothing'"),
        (["--op=attention", "--isa=mmx"], "--isa got 'mmx'"),
    ],
)
def test_an_option_that_is_wrong(argv, said, capsys):
    assert cli.main(["bench", "--device=cpu", *argv]) == cli.USER_ERROR
    assert said in capsys.readouterr().err


def parsed(*argv):
    import argparse

    parser = argparse.ArgumentParser()
    bench_options.add_options(parser)
    return bench_options.parse(parser.parse_args(["--device=cpu", *argv]))


def test_options_make_the_product():
    options = parsed(
        "--op=attention,dropout_add_layer_norm", "--mode=fwd,bwd", "--seq=8,16", "--head-dim=4,8",
        "--causal=both", "--dtype=bf16", "--rows=3", "--width=5,7", "--only=fused,plain,eager",
    )  # fmt: skip
    assert len(options.entries) == 2 * (2 * 2 * 2 + 2)
    cases = [entry.case for entry in options.entries if entry.op == "attention"]
    assert {(case.seq, case.head_dim, case.causal) for case in cases} == {
        (n, d, causal) for n in (8, 16) for d in (4, 8) for causal in (False, True)
    }
    assert {entry.impls for entry in options.entries} == {("fused", "plain"), ("fused", "eager")}
    assert {e.case.dropout_p for e in options.entries if e.op != "attention"} == {0.1}


def test_match():
    options = parsed("--suite=cpu", "--match=one call")
    assert [entry.case.seq for entry in options.entries] == [16, 16, 16]


@pytest.fixture
def here(monkeypatch):
    """Everything in this process, on a machine that stays the same."""
    environment = points.describe("cpu")
    monkeypatch.setattr(runner, "Workers", lambda fresh, env: Inline())
    monkeypatch.setattr(points, "describe", lambda device: dict(environment))
    found = {"copy_gbps": 9.0, "matmul_tflops": {"fp32": 0.5, "fp16": None}, "call_us": 1.0}
    monkeypatch.setattr(ceilings, "measure", lambda device: found)
    return environment


@pytest.mark.parametrize("cut", [False, True])
def test_run_resume_and_interrupt(cut, here, tmp_path, monkeypatch, capsys):
    """What is on disk after a Ctrl-C is whole, and --resume measures the rest alone."""
    argv = ["bench", "--device=cpu", "--op=attention", "--mode=fwd", "--seq=8,16", "--heads=1"]
    argv += ["--head-dim=4", "--dtype=fp32", "--only=plain", "--seconds=0.01", "--max-rounds=3"]
    argv += [f"--out={tmp_path}"]
    real, seen = runner.Runner.entry, []

    def entry(self, asked):
        seen.append(asked.case.seq)
        if cut and len(seen) == 2:
            raise KeyboardInterrupt
        return real(self, asked)

    monkeypatch.setattr(runner.Runner, "entry", entry)
    assert cli.main(argv) == (cli.INTERRUPTED if cut else 0)
    first = document.read(tmp_path / "bench.json", "bench")
    assert first["state"] == (document.CUT if cut else document.COMPLETE)
    assert [r["case"]["seq"] for r in first["rows"]] == ([8] if cut else [8, 16])
    assert ("--resume" in capsys.readouterr().err) == cut
    cut = False
    assert cli.main([*argv, "--resume", "--csv=-"]) == 0
    again = document.read(tmp_path / "bench.json", "bench")
    assert [r["case"]["seq"] for r in again["rows"]] == [8, 16]
    assert again["rows"][0] == first["rows"][0]
    assert len(seen) == (3 if len(first["rows"]) == 1 else 2)
    assert capsys.readouterr().out.startswith("op,mode,quantity,isa,batch")


def test_resume_refuses_another_machine(here, tmp_path, capsys):
    argv = ["bench", "--device=cpu", "--op=attention", "--only=plain", "--seq=8", "--mode=fwd"]
    argv += ["--dtype=fp32", "--seconds=0.01", "--max-rounds=3", f"--out={tmp_path}"]
    assert cli.main(argv) == 0
    here["device_name"] = "another"
    assert cli.main([*argv, "--resume"]) == cli.USER_ERROR
    assert "here it is 'another'" in capsys.readouterr().err


def test_a_user_is_not_named(tmp_path, monkeypatch):
    """Whatever a compiler or a test said: the file can be committed."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    said = f"g++ -I{tmp_path}/include: no {tmp_path}, but {tmp_path}-2"
    held = document.Document(tmp_path / "x.json", "bench", {}, {}, rows=[{"reason": said}])
    held.finish(document.COMPLETE)
    (row,) = document.read(tmp_path / "x.json")["rows"]
    assert row["reason"] == f"g++ -I~/include: no ~, but {tmp_path}-2"


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "cannot be read"), ("{}", "no schema_version"), ('{"schema_version": 99}', "99")],
)
def test_a_file_that_is_no_result(text, said, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        document.read(path)
