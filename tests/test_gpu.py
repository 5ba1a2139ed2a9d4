"""fusedformer gpu: the order of its steps, what it records, what a cut leaves; run on the CPU."""

import argparse
import json
import os
import sys
import time

import pytest
import torch

from fusedformer import cli
from fusedformer.benchmarks import (
    ceilings,
    document,
    gpu,
    gpu_checks,
    gpu_state,
    gpu_tests,
    runner,
    workers,
)


class Scripted:
    """Worker processes that answer from a script, by the function's name."""

    def __init__(self, *answers):
        self.answers = dict(answers)

    def __call__(self, fresh, env):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def run(self, function, *args, timeout=None):
        answer = self.answers.get(function.__name__, {})
        return answer if isinstance(answer, workers.Outcome) else workers.Outcome("ok", answer)


MASK = {"op": "dropout", "p": 0.1, "elements": 9, "dropped": 0.1, "deviation": 0.0, "differing": 0}


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    """Makes a run whose steps cost nothing; its benchmarks and tests are left out."""

    def make(*answers, budget=100.0, asked=gpu.STEPS, **steps):
        monkeypatch.setattr(runner, "Workers", Scripted(("dropout", [MASK]), *answers))
        monkeypatch.setattr(gpu.Evidence, "_start_build", lambda self: None)
        for name in ("build", "tests", "benchmarks", "sanitizer", "models"):
            step = steps.get(name, lambda self, runner, part: "")
            monkeypatch.setattr(gpu.Evidence, f"_{name}", step)
        held = gpu.Evidence("cpu", True, budget, tmp_path, asked)
        held.collect()
        held.document.finish(document.COMPLETE)
        return document.read(tmp_path / "gpu.json", "gpu")

    return make


def statuses(data):
    return {step["name"]: step["status"] for step in data["steps"]}


def test_steps_in_order(evidence):
    data = evidence(("describe", {"device_name": "x"}), ("measure", {"copy_gbps": 1.0}))
    assert list(statuses(data)) == [
        "environment", "ceilings", "build", "dropout", "tests", "benchmarks", "sanitizer",
        "models",
    ]  # fmt: skip
    assert set(statuses(data).values()) == {"ok"}
    assert data["environment"] == {"device_name": "x"}
    assert data["ceilings"] == {"copy_gbps": 1.0}


def test_a_step_that_fails_stops_no_other(evidence):
    def fails(self, runner, part):
        raise RuntimeError("no such thing")

    died = workers.Outcome(workers.FAILED, reason="the process ended with exit code -11")
    data = evidence(("measure", died), tests=fails)
    assert statuses(data) == {
        "environment": "ok", "ceilings": "failed", "build": "ok", "dropout": "ok",
        "tests": "failed", "benchmarks": "ok", "sanitizer": "ok", "models": "ok",
    }  # fmt: skip
    reasons = [step["reason"] for step in data["steps"] if step["reason"]]
    assert "exit code -11" in reasons[0]
    assert reasons[1] == "RuntimeError: no such thing"


@pytest.mark.parametrize("change", [{"differing": 1}, {"deviation": -5.1}])
def test_a_wrong_mask_fails_the_step(change, evidence):
    data = evidence(("dropout", [MASK | change]))
    assert statuses(data)["dropout"] == "failed"
    assert statuses(data)["tests"] == "ok"


def test_the_budget_stops_cleanly(evidence):
    data = evidence(budget=1.0)
    assert set(statuses(data).values()) == {"stopped"}
    assert data["state"] == "complete"


def test_exit_code_and_files(tmp_path, monkeypatch, capsys):
    def collect(self):
        self._data["steps"] = [{"name": "tests", "status": "failed", "reason": "a", "seconds": 1}]

    monkeypatch.setattr(gpu.Evidence, "collect", collect)
    assert cli.main(["gpu", "--device=cpu", f"--out={tmp_path}"]) == 1
    assert "gpu.json" in capsys.readouterr().out

    def cut(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu.Evidence, "collect", cut)
    assert cli.main(["gpu", "--device=cpu", f"--out={tmp_path}"]) == gpu.INTERRUPTED
    assert document.read(tmp_path / "gpu.json")["state"] == document.CUT


def test_parts_leave_time_for_the_benchmarks():
    assert sum(gpu._PARTS.values()) < 1
    assert max(gpu.BUDGET, gpu.QUICK_BUDGET) < 9 * 60


# --- Checks ---------------------------------------------------------------------------------------


def test_dropout_masks_are_the_contracts():
    found = gpu_checks.dropout("cpu")
    assert len(found) == 2 * len(gpu_checks.PROBABILITIES)
    assert all(row["differing"] == 0 for row in found)
    assert all(abs(row["deviation"]) < 5 for row in found)


def test_a_mask_that_is_not_the_contracts_is_seen(monkeypatch):
    real = gpu_checks.fusedformer.dropout
    monkeypatch.setattr(
        gpu_checks.fusedformer, "dropout", lambda x, p, seed, backend: real(x, p, seed=seed + 1)
    )
    found = [row for row in gpu_checks.dropout("cpu") if row["op"] == "dropout"]
    assert all(row["differing"] for row in found)


def test_odd_shapes_run():
    assert gpu_checks.odd_shapes("cpu") >= 20


@pytest.mark.skipif(os.name != "posix", reason="the double of the sanitizer is a shell script")
def test_sanitizers_are_told_apart(tmp_path):
    """All of a tool's run side by side: one finds something, one is not done in time."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "--tool=racecheck*gpu_checks) echo a hazard; exit 99;;\n"
        "--tool=synccheck*) sleep 60;;\n"
        "esac\n"
    )
    tool.chmod(0o755)
    found = gpu._sanitize(str(tool), gpu._SANITIZERS, time.perf_counter() + 0.5)
    assert {one["tool"]: one["status"] for one in found} == {
        "memcheck": "ok", "racecheck": "failed", "synccheck": "stopped", "initcheck": "ok",
    }  # fmt: skip
    assert (found[1]["reason"], found[1]["output"]) == ("exit code 99", "a hazard\n")


def test_ceilings(monkeypatch):
    monkeypatch.setitem(ceilings._COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(ceilings._SIDE, "cpu", 64)
    monkeypatch.setattr(ceilings, "_SECONDS", 0.01)
    found = ceilings.measure("cpu")
    assert found["copy_gbps"] > 0
    assert found["call_us"] > 0
    assert set(found["matmul_tflops"]) == {"fp32", "fp16", "bf16"}


@pytest.mark.parametrize("times", [(1.0, 4.0), (4.0, 1.0)])
def test_a_ceiling_is_that_of_the_fastest_way(times, monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    ways = iter(times)
    monkeypatch.setitem(ceilings._SIDE, "cpu", 64)
    monkeypatch.setattr(ceilings, "_best", lambda call, clock: (call(), next(ways))[1])
    assert ceilings._product("cpu", "fp32", None) == 2 * 64**3 / 1e9


def test_gpu_state():
    text = "1980, 2619, 412.3, 51\n1755, 2619, 690.0, 60\n[N/A], 2619, 500, 55\ncut o"
    found = gpu_state.summary(text)
    assert found["sm_mhz"] == {"low": 1755, "median": 1867.5, "high": 1980}
    assert found["watts"]["high"] == 690
    assert gpu_state.summary("") == {}
    with gpu_state.watched("cpu") as held:
        pass
    assert held == {}


# --- The tests of the GPU -------------------------------------------------------------------------


def test_tests_that_hang_or_die_are_failures_and_no_end(tmp_path, monkeypatch):
    """Two processes: passed, failed, skipped, one that hangs, one that takes its process down."""
    path = tmp_path / "test_some.py"
    path.write_text(
        "import os, time, pytest\n"
        "def test_hangs(): time.sleep(60)\n"
        "def test_dies(): os._exit(7)\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'sums'\n"
        "@pytest.mark.skip(reason='no such chip')\n"
        "def test_absent(): pass\n"
        "@pytest.mark.slow\n"
        "def test_slow(): pass\n"
    )
    monkeypatch.setattr(gpu_tests, "LONGEST", 1.0)
    other = tmp_path / "test_other.py"
    other.write_text("import no_such_module\n")
    log = tmp_path / "log.jsonl"
    found = gpu_tests.run([str(path), str(other)], 60, log, slow=False, processes=2)
    assert found["state"] == "complete", found["reason"]
    assert found["counts"] == {"passed": 1, "failed": 4, "skipped": 1}
    reasons = {held["test"].partition("::")[2]: held["reason"] for held in found["problems"]}
    assert "no_such_module" in reasons[""]
    assert "not done after 1 s" in reasons["test_hangs"]
    assert "exit code 7" in reasons["test_dies"]
    assert "sums" in reasons["test_bad"]
    assert [reason.partition(": ")[2] for reason in found["skipped"]] == ["no such chip"]
    assert found["unfinished"] == []


def test_a_log_that_was_cut_off(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"test": "a", "outcome": "started"}\n{"test": "a", "outcome": "passed", "seconds": 1.0}\n'
        '{"test": "b", "outcome": "started"}\n{"test": "c", "outc'
    )
    found = gpu_tests.read(log)
    assert found["counts"] == {"passed": 1}
    assert found["unfinished"] == ["b"]


def test_only_some_steps(evidence, tmp_path):
    assert list(statuses(evidence(asked=("tests", "environment")))) == ["environment", "tests"]
    argv = ["gpu", "--device=cpu", "--steps=sleep", f"--out={tmp_path}"]
    assert cli.main(argv) == cli.USER_ERROR


def test_tuning_is_a_step_on_request(evidence, tmp_path, monkeypatch):
    assert "tune" not in statuses(evidence())
    assert statuses(evidence(asked=("tune",))) == {"tune": "not available"}

    def tuners(out, seconds):
        assert seconds == 30
        codes = {"a.json": 0, "b.json": 3}
        return {
            name: [sys.executable, "-c", f"print('said'); raise SystemExit({code})"]
            for name, code in codes.items()
        }

    monkeypatch.setattr(gpu, "tuners", tuners)
    held = gpu.Evidence("cuda", True, 30, tmp_path, ("tune",))
    assert held._tune(None, 30) == "failed: b.json: exit code 3"
    assert (tmp_path / "a.txt").read_text() == "said\n"


def test_the_tuners_take_their_options(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from fusedformer.benchmarks import tune, tune_cuda

    first, second = gpu.tuners(tmp_path, 100).values()
    parser = argparse.ArgumentParser()
    tune.configure(parser)
    found = parser.parse_args(first[3:])
    assert (found.out, found.budget, first[2]) == (str(tmp_path), "60", tune.__name__)
    asked = []
    monkeypatch.setattr(tune_cuda, "unsupported_gpu", lambda device: None)
    monkeypatch.setattr(tune_cuda.environment, "describe", lambda device: {})
    monkeypatch.setattr(tune_cuda, "run", lambda seconds: asked.append(seconds) or ())
    monkeypatch.setattr("sys.argv", second[2:])
    assert tune_cuda.main() == 0
    assert (asked, second[2]) == ([30.0], tune_cuda.__name__)


def test_files_for_a_gpu():
    names = gpu_tests.files()
    assert {"test_attention.py", "test_cross_entropy.py", "test_timing.py"} <= set(names)
    assert "test_cli.py" not in names


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_whole_run_on_a_cpu(tmp_path):
    argv = ["gpu", "--quick", "--device=cpu", "--budget=150", f"--out={tmp_path}"]
    code = cli.main(argv)
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert code == 0, data["steps"]
    assert data["state"] == "complete"
    found = statuses(data)
    assert list(found) == list(gpu.STEPS)
    assert found.pop("sanitizer") == "not available"
    assert set(found.values()) == {"ok"}
    assert data["tests"]["counts"]["passed"] > 20
    ops = {row["op"] for row in data["rows"]}
    assert ops >= {"attention", "cross_entropy", "gpt_training", "transformer_step", "gpt_decode"}
    assert all(row["status"] == "ok" for row in data["rows"])
