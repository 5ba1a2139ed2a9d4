"""The tuning command: its branches, what it keeps of each candidate, that nothing is lost.

Nothing is timed here: what a GPU would answer is written down, and what would be compiled for one
is compiled in a slow test.
"""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import launched

from fusedformer import aot
from fusedformer.benchmarks import tune, tune_branches, workers

BRANCHES = tune_branches.branches()
# Of every chooser some: those of attention come in threes.
SOME = [b for i, b in enumerate(BRANCHES) if i % 4 == 0 or b.module == "cross_entropy"]
CHIP = (90, 132)


def test_names_are_of_one_branch_each():
    assert len({branch.name for branch in BRANCHES}) == len(BRANCHES)


@pytest.mark.parametrize("branch", SOME, ids=lambda branch: branch.name)
def test_a_candidate_is_what_is_launched(branch):
    from fusedformer.kernels.triton import launch

    chip = launch.Chip(*CHIP)
    with launch.recording(chip):
        call = branch.make("meta")
        returned = sum(out is not None for out in call())
    seen = set()
    for candidate in (None, branch.candidates[0], branch.candidates[-1]):
        before, own, after, outputs = tune_branches.launches(branch, candidate, call, chip)
        for entries, names in ((before, branch.before), (after, branch.after)):
            assert [entry.kernel.__name__ for entry in entries] == list(names)
        assert len(own) == 1
        # All that the call returns, of attention's backward what its other kernels do not make.
        parts = {"key_value_grads_config": 2, "query_grads_config": 1}
        assert len(outputs) == parts.get(branch.chooser, returned)
        if candidate is not None:
            seen.add(repr(own[0].options))
    assert len(seen) == len({repr(branch.candidates[0]), repr(branch.candidates[-1])})


def test_samples_are_not_kept():
    """Of 1900 candidates they would be megabytes."""
    found = tune._summary({"ms": [3.0, 1.0, 2.0]})
    assert found == {"rounds": 3, "median": 2.0, "p20": 1.4, "p80": pytest.approx(2.6)}
    assert tune._summary({"error": ValueError("no")}) == {"error": "no"}


def test_the_launcher_chooses_for_itself_again():
    branch = BRANCHES[0]
    before = branch.backend().forward_config
    with tune_branches.choosing(branch, branch.candidates[0]):
        assert branch.backend().forward_config() is branch.candidates[0]
    assert branch.backend().forward_config is before
    with tune_branches.choosing(branch, None):
        assert branch.backend().forward_config is before
    with pytest.raises(KeyError), tune_branches.choosing(branch, branch.candidates[0]):
        raise KeyError
    assert branch.backend().forward_config is before


# --- What is kept ---------------------------------------------------------------------------------

# Of the first branch: its own choice takes 2 ms; candidate 0 is left out, 1 fails, 2 gives other
# results, 3 is faster, the rest are slower.
_MS = {tune.OWN: 2.0, 3: 1.0}


class _Gpu:
    """Answers as the process that measures would."""

    hanging: "tuple[int, ...]" = ()
    hung: "list[tuple[str, int]]"

    def __init__(self, fresh: bool) -> None:
        pass

    def __enter__(self) -> "_Gpu":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def run(self, function, name, argument, timeout):
        if function is tune.check:
            assert argument != 0
            if argument in self.hanging:
                _Gpu.hung = [*_Gpu.hung, (name, argument)]
                return workers.Outcome(workers.TOO_SLOW, reason="not done after 40 s")
            if argument == 1:
                return workers.Outcome(workers.FAILED, reason="OutOfResources: shared memory")
            return workers.Outcome(workers.OK, 30.0 if argument == 2 else 0.1)
        assert {0, 1, 2}.isdisjoint(argument)
        found = {index: {"median": _MS.get(index, 3.0)} for index in argument}
        return workers.Outcome(workers.OK, found)


@pytest.fixture
def tuned(monkeypatch, tmp_path, capsys):
    """Runs the command on a GPU that is not there; gives exit code, document and output."""

    def run(*argv, compiled=lambda name, index: None):
        def in_workers(function, tasks, jobs, crashed):
            for name, index, capability, _ in tasks:
                compiled(name, index)
                broken = ["8 bytes of stack a thread, over 0"] if index == 0 else []
                yield aot.Report(name, "a_kernel", capability, 16, {}, 100, faults=broken)

        monkeypatch.setattr(aot, "in_workers", in_workers)
        monkeypatch.setattr(tune.workers, "Workers", _Gpu)
        monkeypatch.setattr(tune, "device_of", lambda got: "cuda")
        monkeypatch.setattr(tune.points, "describe", lambda device: {"device": device})
        properties = type("Properties", (), {"major": 9, "minor": 0, "multi_processor_count": 132})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr("sys.argv", ["tune", "--out", str(tmp_path), *argv])
        code = tune.main()
        out = capsys.readouterr()
        path = tmp_path / "tune.json"
        return code, json.loads(path.read_text()) if path.exists() else None, out

    return run


def test_rows(tuned):
    code, data, out = tuned("--only", "forward, d = 128, causal, p = 0.1")
    assert (code, data["state"], data["kind"]) == (0, "complete", "tune")
    own, left_out, failed, differs, fast, *rest = data["rows"]
    assert (own["own"], own["status"], own["ms"]["median"]) == (True, workers.OK, 2.0)
    assert (left_out["status"], left_out["reason"]) == (
        tune.LEFT_OUT, "8 bytes of stack a thread, over 0",
    )  # fmt: skip
    assert (failed["status"], failed["reason"]) == (
        workers.FAILED, "OutOfResources: shared memory",
    )  # fmt: skip
    assert (differs["status"], differs["difference"]) == (tune.DIFFERS, 30.0)
    assert fast["ms"]["median"] == 1.0
    assert len(rest) == len(BRANCHES[3].candidates) - 4
    assert all("ms" not in row for row in (left_out, failed, differs))
    # The summary: own time, its ratio to the best, which that was.
    assert "2.000" in out.out
    assert all(f"{k}={v}" in out.out for k, v in fast["candidate"].items())


def test_what_hangs_costs_its_time_once(tuned, monkeypatch):
    """Both branches have specialized candidates; of each chooser one alone is waited for."""
    first, second = BRANCHES[0], BRANCHES[3]
    assert first.chooser == second.chooser
    some = [i for i, held in enumerate(first.candidates) if held.specialized and i > 3]
    assert len(some) > 1
    monkeypatch.setattr(_Gpu, "hanging", some)
    monkeypatch.setattr(_Gpu, "hung", [], raising=False)
    _, data, _ = tuned("--only", "forward, d = 128, causal")
    assert _Gpu.hung == [(first.name, some[0])]
    later = [row for row in data["rows"] if row["branch"] == second.name]
    hanging = [row for row in later if row["candidate"].get("specialized")]
    assert {row["reason"] for row in hanging} == {"not tried: one like it did not end"}
    assert sum(row["status"] == workers.OK for row in data["rows"]) > len(data["rows"]) / 2


def test_an_interrupt_keeps_what_was_measured(tuned):
    def compiled(name, index):
        if name == BRANCHES[1].name:
            raise KeyboardInterrupt

    code, data, _ = tuned(compiled=compiled)
    assert (code, data["state"]) == (130, "interrupted")
    assert len(data["rows"]) == 1 + len(BRANCHES[0].candidates)
    assert data["rows"][0]["ms"]["median"] == 2.0


def test_the_budget_stops_it_between_branches(tuned, monkeypatch):
    clock = iter([0.0, 1.0] + 100 * [20.0])
    monkeypatch.setattr(tune, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    code, data, _ = tuned("--budget", "10")
    assert code == 0
    assert {row["branch"] for row in data["rows"]} == {BRANCHES[0].name}
    assert data["stopped"] == [branch.name for branch in BRANCHES[1:]]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "no such"], "--only: no branch's name holds 'no such'"),
        (["--jobs", "0"], "--jobs must be 1 or more; got 0"),
    ],
)
def test_user_errors(tuned, argv, message):
    code, data, out = tuned(*argv)
    assert (code, data, out.err) == (2, None, f"tune: {message}\n")


# --- The compiler ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_a_gpu_candidates_are_compiled(tmp_path, monkeypatch):
    argv = ["--only", "layer norm forward, width 768", "--device", "cpu", "--jobs", "1"]
    monkeypatch.setattr("sys.argv", ["tune", "--out", str(tmp_path), *argv])
    assert tune.main() == 0
    rows = json.loads((tmp_path / "tune.json").read_text())["rows"]
    assert rows[0]["own"]
    assert {row["status"] for row in rows} <= {tune.COMPILED, tune.LEFT_OUT}
    assert sum(row["status"] == tune.COMPILED for row in rows) >= len(rows) / 2
    assert all(row["registers"] > 0 for row in rows)


@pytest.mark.slow
def test_a_launch_finds_what_was_compiled():
    """Or the time on a GPU would go into compiling everything again."""
    names = ["attention forward, d = 64, causal, p = 0", "cross-entropy forward, 32768 classes"]
    with aot.worker_pool(1) as pool:
        for ahead, by_launch in pool.submit(launched.hashes, names).result():
            assert ahead == by_launch
