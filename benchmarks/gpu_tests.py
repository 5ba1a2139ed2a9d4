"""Runs the project's tests in several processes, and keeps each result as it comes.

What takes the time on a GPU is compiling kernels, so each process takes every n-th test. One that
hangs, dies or has broken the GPU's context is replaced, and the rest goes on: such a test is a
failure of its own, no end.

This file is also the pytest plugin that the processes load: it chooses their part of the tests and
writes one JSON object a line, so that a run that is cut off keeps what it had.
"""

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedformer.benchmarks import workers

ROOT = Path(__file__).resolve().parent.parent

# Seconds that one test may take: compiling its kernels is most of it.
LONGEST = 90.0

# These measure time, and so run when the others are done.
_ALONE = ("test_timing.py",)

# What a log says of a test before its outcome.
_STARTED = "started"

# --- The plugin -----------------------------------------------------------------------------------


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--results", help="file that gets a line of JSON for each test")
    parser.addoption("--part", default="0/1", help="i/n: every n-th test, from the i-th on")


class _Log:
    def __init__(self, path: str, part: str) -> None:
        self._path = Path(path)
        self._part, self._parts = map(int, part.split("/"))
        self._session: Any = None

    def pytest_sessionstart(self, session: Any) -> None:
        self._session = session

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """This process's part, without what a process before it ran or died in."""
        seen = {line["test"] for line in lines(self._path)}
        # Shuffled, so that what fits in the time is a fair sample; slow ones come last.
        ordered = random.Random(0).sample(items, len(items))
        ordered.sort(key=lambda item: item.get_closest_marker("slow") is not None)
        mine = [held for held in ordered[self._part :: self._parts] if held.nodeid not in seen]
        chosen = set(mine)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = mine

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and self._part == 0:  # a file that cannot be imported
            reason = _reason(report)
            self._write(
                {"test": report.nodeid, "outcome": "failed", "seconds": 0.0, "reason": reason}
            )

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write({"test": nodeid, "outcome": _STARTED, "at": time.time()})

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            line = {
                "test": report.nodeid,
                "outcome": report.outcome,
                "seconds": round(report.duration, 3),
            }
            if report.outcome != "passed":
                line["reason"] = _reason(report)
                if "CUDA error" in str(report.longrepr):
                    # Every later call in this process would fail alike.
                    self._session.shouldstop = "the GPU's context is broken"
            self._write(line)

    def _write(self, line: dict) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"part": self._part}) + "\n")


def _reason(report: Any) -> str:
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return str(report.longrepr[-1])
    # The lines that pytest marks as the error's own, else the last.
    text = [line for line in str(report.longrepr).splitlines() if line.strip()]
    own = [line[1:].strip() for line in text if line.startswith("E ")]
    return "\n".join((own or text[-1:])[:5])[:1000]


def pytest_configure(config: Any) -> None:
    if config.getoption("--results"):
        config.pluginmanager.register(
            _Log(config.getoption("--results"), config.getoption("--part"))
        )


# --- One process after the other ------------------------------------------------------------------


@dataclass
class _Part:
    """The processes, one after the other, that run one part of the tests."""

    command: list[str]
    environment: dict[str, str]
    log: Path
    output: Path
    number: int
    state: str = ""  # "" while it runs, then "complete", "stopped" or "failed"
    reason: str = ""
    _process: Any = None
    _known: int = 0  # its lines in the log when the process started

    def start(self) -> None:
        self._known = len(self._mine())
        with self.output.open("w") as file:
            self._process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def look(self) -> None:
        """Sees to a process that is done, has died or hangs."""
        code = self._process.poll()
        new = self._mine()[self._known :]
        running = new[-1] if new and new[-1]["outcome"] == _STARTED else None
        if code is None and (running is None or time.time() - running["at"] < LONGEST):
            return
        if running is not None:
            workers.end_group(self._process)
            said = f"not done after {LONGEST:.0f} s" if code is None else f"exit code {code}"
            self._failed(running, f"its process was replaced: {said}")
        elif code in (0, 1, 5):  # 1: tests failed; 5: there were none
            self.state = "complete"
            return
        elif not new:
            self.state, self.reason = "failed", self.output.read_text(errors="replace")[-1000:]
            return
        self.start()

    def stop(self, reason: str) -> None:
        """Ends it, if it still runs."""
        if not self.state:
            if self._process is not None:
                workers.end_group(self._process)
            self.state, self.reason = "stopped", reason

    def _mine(self) -> list[dict]:
        return [line for line in lines(self.log) if line.get("part") == self.number]

    def _failed(self, running: dict, reason: str) -> None:
        seconds = round(time.time() - running["at"], 1)
        line = running | {"outcome": "failed", "seconds": seconds, "reason": reason}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


# --- The run --------------------------------------------------------------------------------------


def files() -> list[str]:
    """Test files that run on a GPU where there is one."""
    return [
        path.name
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if re.search(r"\bon_device\b|mark\.gpu\b", path.read_text(encoding="utf-8"))
    ]


def missing() -> "str | None":
    """Why there are no tests to run, or None."""
    if not (ROOT / "tests").is_dir():
        return "the tests come with a checkout alone"
    return None if importlib.util.find_spec("pytest") else "pytest is not installed"


def run(
    names: list[str], seconds: float, log: Path, *, slow: bool = True, processes: int = 1
) -> dict:
    """Runs test files for at most ``seconds``.

    Returns:
        "counts" by outcome; "problems", those that failed, and "skipped" by reason; "unfinished",
        what ran when the time was up; "slowest" with their seconds; "state": "complete", or
        "stopped" when the time was up, or "failed" when pytest itself did, with the "reason".
    """
    log.unlink(missing_ok=True)
    end = time.monotonic() + seconds
    together = [name for name in names if name not in _ALONE]
    alone = [name for name in names if name in _ALONE]
    count = max(1, min(processes, os.cpu_count() or 1))
    state, reason = "complete", ""
    for chosen, parts in ((together, count), (alone, 1)):
        if chosen and state == "complete":
            state, reason = _run(chosen, parts, end, log, slow)
    return {"state": state, "reason": reason, **read(log)}


def _run(names: list[str], count: int, end: float, log: Path, slow: bool) -> tuple[str, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "fusedformer.benchmarks.gpu_tests", f"--results={log.resolve()}"]
    command += ["--continue-on-collection-errors", *([] if slow else ["-m", "not slow"])]
    command += [str(Path("tests", name)) for name in names]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()]),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
    }
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fusedformer-tests-") as folder:
        parts = [
            _Part([*command, f"--part={i}/{count}"], environment, log, Path(folder, str(i)), i)
            for i in range(count)
        ]
        try:
            for part in parts:
                part.start()
            while time.monotonic() < end and not all(part.state for part in parts):
                time.sleep(0.5)
                for part in parts:
                    if not part.state:
                        part.look()
        finally:
            for part in parts:
                part.stop(f"not done after {time.monotonic() - begun:.0f} s")
    worst = max(parts, key=lambda part: ("complete", "stopped", "failed").index(part.state))
    return worst.state, worst.reason


def _python_path() -> list[str]:
    return list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))


def lines(log: Path) -> list[dict]:
    """The lines of a log, in order, but for one that was cut off."""
    found = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def read(log: Path) -> dict:
    """What a log of results says: "counts", "problems", "skipped", and so on; see run()."""
    held = lines(log)
    ended: dict[str, dict] = {}
    for line in held:
        # One that passed, and failed when it was torn down, failed.
        if line["outcome"] != _STARTED and ended.get(line["test"], {}).get("outcome") != "failed":
            ended[line["test"]] = line
    results = list(ended.values())
    slowest = sorted(results, key=lambda result: -result["seconds"])[:10]
    return {
        "counts": dict(Counter(result["outcome"] for result in results)),
        "seconds": round(sum(result["seconds"] for result in results), 1),
        "slowest": {result["test"]: result["seconds"] for result in slowest},
        "unfinished": [line["test"] for line in held if line["test"] not in ended],
        "problems": [result for result in results if result["outcome"] == "failed"],
        "skipped": dict(Counter(r["reason"] for r in results if r["outcome"] == "skipped")),
    }
