"""Runs the project's tests in a process of their own, and keeps each result as it comes.

This file is also the pytest plugin that writes them: one JSON object a line, so that a run that is
cut off keeps what it had.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_WORKERS = 8  # where pytest-xdist is there: compiling kernels is what takes the time

# --- The plugin -----------------------------------------------------------------------------------


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--results", help="file that gets a line of JSON for each test")


class _Log:
    def __init__(self, path: str) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            line = {
                "test": report.nodeid,
                "outcome": report.outcome,
                "seconds": round(report.duration, 3),
            }
            if report.outcome != "passed":
                line["reason"] = _reason(report)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _reason(report: Any) -> str:
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return str(report.longrepr[-1])
    # The lines that pytest marks as the error's own, else the last.
    lines = [line for line in str(report.longrepr).splitlines() if line.strip()]
    own = [line[1:].strip() for line in lines if line.startswith("E ")]
    return "\n".join((own or lines[-1:])[:5])[:1000]


def pytest_configure(config: Any) -> None:
    if config.getoption("--results") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Log(config.getoption("--results")))


# --- The run --------------------------------------------------------------------------------------


def files() -> list[str]:
    """Test files that run on a GPU where there is one, those of kernels first."""
    first = ("test_attention.py", "test_layer_norm.py", "test_dropout.py", "test_cross_entropy.py")
    named = [
        path.name
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if re.search(r"\bon_device\b|mark\.gpu\b", path.read_text(encoding="utf-8"))
    ]
    return sorted(named, key=lambda name: (name not in first, name))


def run(names: list[str], seconds: float, log: Path) -> dict:
    """Runs test files for at most ``seconds``.

    Returns:
        "counts" by outcome; "problems", those that failed, and "skipped" by reason; "state":
        "complete", or "stopped" when the time was up, or "failed" when pytest itself did, with
        the "reason".
    """
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "fusedformer.benchmarks.gpu_tests", f"--results={log}", "-m", "not slow"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(_WORKERS, os.cpu_count() or 1))]
    command += [f"tests/{name}" for name in names]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()])}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    state, reason = "complete", ""
    try:
        text, _ = process.communicate(timeout=max(1.0, seconds))
        if process.returncode not in (0, 1):  # 1: tests failed
            state, reason = "failed", text[-1000:]
    except subprocess.TimeoutExpired:
        state, reason = "stopped", f"not done after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return {"state": state, "reason": reason, **read(log)}


def _python_path() -> list[str]:
    return list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))


def read(log: Path) -> dict:
    """What a log of results says: "counts", "problems", "skipped"."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    results = []
    for line in lines:
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the last one, cut off
    return {
        "counts": dict(Counter(result["outcome"] for result in results)),
        "seconds": round(sum(result["seconds"] for result in results), 1),
        "problems": [result for result in results if result["outcome"] == "failed"],
        "skipped": dict(Counter(r["reason"] for r in results if r["outcome"] == "skipped")),
    }
