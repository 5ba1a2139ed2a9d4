"""The whole flow with real worker processes, at a size that takes seconds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusedformer import cli
from fusedformer.benchmarks import document, workers

ROOT = Path(__file__).resolve().parent.parent

SMALL = ["bench", "--device=cpu", "--mode=fwd_bwd", "--heads=2", "--head-dim=8", "--rows=8"]
SMALL += ["--width=16", "--dtype=fp32", "--seconds=0.05", "--max-rounds=4", "--skip=compile"]


def rows_on_disk(path: Path) -> int:
    try:
        return len(json.loads(path.read_text())["rows"])
    except (OSError, json.JSONDecodeError):
        return 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="for POSIX systems")
def test_measure_kill_resume_compare(tmp_path, capsys):
    """A run that is killed leaves its file whole; the next one goes on; the two can be compared."""
    argv = [*SMALL, "--op=attention,layer_norm", "--seq=16,32,64,128", f"--out={tmp_path}"]
    path = tmp_path / "bench.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "fusedformer", *argv], env=environment, cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        end = time.perf_counter() + 60
        while not rows_on_disk(path) and time.perf_counter() < end:
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    cut = document.read(path, "bench")
    assert cut["state"] == document.RUNNING
    assert cut["rows"]
    first = {(row["key"], row["impl"]): row for row in cut["rows"]}

    assert cli.main([*argv, "--resume", f"--csv={tmp_path / 'bench.csv'}"]) == 0
    whole = document.read(path, "bench")
    assert whole["state"] == document.COMPLETE
    assert len({row["key"] for row in whole["rows"]}) == 4 + 1
    kept = {(row["key"], row["impl"]): row for row in whole["rows"]}
    assert all(kept[key] == row for key, row in first.items())
    assert whole["ceilings"]["copy_gbps"] > 0
    ran = [row for row in whole["rows"] if row["status"] == workers.OK]
    assert {row["impl"] for row in ran} >= {"fused", "sdpa", "plain", "eager"}
    assert all(row["ms"]["median"] > 0 and row["error"]["backward"] < 1e-5 for row in ran)
    assert all(row["memory"]["bytes"] is not None for row in ran)
    assert (tmp_path / "bench.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "bench.csv").read_text().count("\n") == 1 + len(whole["rows"])
    said = capsys.readouterr().out
    assert "Against the baseline" in said

    assert cli.main(["bench", "compare", str(path), str(path)]) == 0


@pytest.mark.slow
def test_both_sides_held_to_an_instruction_set(tmp_path):
    """In a process of its own, which torch's libraries and ours both find limited."""
    argv = [*SMALL, "--op=attention", "--seq=32", "--isa=avx2", "--only=fused,sdpa"]
    assert cli.main([*argv, f"--out={tmp_path}"]) == 0
    data = document.read(tmp_path / "bench.json", "bench")
    assert [(row["isa"], row["status"]) for row in data["rows"]] == [("avx2", workers.OK)] * 2
    environment = {"ATEN_CPU_CAPABILITY": "avx2"}
    with workers.Workers(True, environment) as pool:
        asked = "__import__('torch').backends.cpu.get_cpu_capability()"
        assert pool.run(eval, asked).value in ("AVX2", "DEFAULT", "NO AVX")
    assert "ATEN_CPU_CAPABILITY" not in os.environ


@pytest.mark.slow
def test_as_pytest_benchmark_has_it(tmp_path):
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/", "-q", "-p", "no:cacheprovider"]
    command += ["--benchmark-only", f"--benchmark-json={out}"]
    command += ["-k", "quick and 64_x_64 and fp32 and forward and not backward and not compile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    tests = json.loads(out.read_text())["benchmarks"]
    found = {test["name"].rpartition("_")[2]: test for test in tests}
    assert set(found) == {"fused]", "eager]"}
    extra = found["fused]"]["extra_info"]
    # Its own statistics are of the very samples that the runner took.
    assert found["fused]"]["stats"]["median"] == pytest.approx(extra["latency"] / 1e3)
    assert extra["gbps"] > 0
    assert extra["error"] < 1e-6
    assert extra["memory"] is not None
