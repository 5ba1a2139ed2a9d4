"""``fusedformer gpu``: all that only a GPU can show, in one run, in one JSON file.

Environment and ceilings, dropout's masks and rates, the tests that need a GPU, the benchmarks
beside torch's own, a sanitizer on small shapes: what matters most first, each step within its part
of a time budget. A step that fails is recorded and the next one runs; what was measured is on disk
after each. On a CPU it does the same, smaller.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fusedformer.benchmarks import (
    bench_tables,
    ceilings,
    gpu_checks,
    gpu_tests,
    points,
    suites,
    terminal,
    workers,
)
from fusedformer.benchmarks.document import COMPLETE, CUT, Document
from fusedformer.benchmarks.entries import default_baseline
from fusedformer.benchmarks.options import device_of, make_folder, seconds
from fusedformer.benchmarks.runner import Limits, Runner
from fusedformer.benchmarks.tables import Table

KIND = "gpu"
INTERRUPTED = 130
BUDGET, QUICK_BUDGET = 500.0, 110.0

# Steps, in order, and the part of the budget that each may take; the benchmarks take what is left
# but for the sanitizer's part.
_PARTS = {"environment": 0.2, "ceilings": 0.1, "dropout": 0.1, "tests": 0.4, "sanitizer": 0.12}
_SANITIZERS = ("memcheck", "racecheck")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument
    add("--out", metavar="DIR", default="gpu", help="where gpu.json goes (gpu)")
    add("--quick", action="store_true", help="in two minutes instead of nine")
    said = f"for all steps ({BUDGET:g}; --quick: {QUICK_BUDGET:g})"
    add("--budget", metavar="SECONDS", help=said)
    add("--device", default="auto", help="auto, cpu or cuda (auto)")


def run(args: argparse.Namespace) -> int:
    """Runs all steps; the exit code is 1 where one of them failed.

    Raises:
        ValueError: an option is wrong; the text is one sentence that names it.
    """
    device = device_of(args.device)
    default = QUICK_BUDGET if args.quick else BUDGET
    budget = default if args.budget is None else seconds("--budget", args.budget)
    out = Path(args.out)
    make_folder(out)
    evidence = Evidence(device, args.quick, budget, out)
    try:
        evidence.collect()
        state = COMPLETE
    except KeyboardInterrupt:
        state = CUT
    evidence.document.finish(state)
    terminal.show(summary(evidence.document.data))
    print(f"{evidence.document.data['seconds']:.0f} s. Written: {evidence.document.path}")
    if state == CUT:
        return INTERRUPTED
    return int(any(step["status"] == workers.FAILED for step in evidence.document.data["steps"]))


class Evidence:
    """One run: its document, and the steps that fill it.

    Args:
        device: "cpu" or "cuda".
        quick: fewer problems.
        budget: seconds for all.
        out: the folder of gpu.json.
    """

    def __init__(self, device: str, quick: bool, budget: float, out: Path) -> None:
        self.device, self.quick, self.budget, self.out = device, quick, budget, out
        self._end = time.perf_counter() + budget
        options = {"quick": quick, "budget": budget, "device": device}
        self.document = Document(
            out / "gpu.json", KIND, options, {}, ceilings=None, steps=[], dropout=[], tests=None,
            rows=[], sanitizer=[],
        )  # fmt: skip
        self._data = self.document.data

    def collect(self) -> None:
        """Runs the steps in order; a step that raises is recorded."""
        limits = Limits(seconds=1.0 if self.quick else 2.0, min_rounds=3, call=120.0)
        with Runner(self.device, limits) as runner:
            steps: list[tuple[str, Callable[[Runner, float], str]]] = [
                ("environment", self._environment),
                ("ceilings", self._ceilings),
                ("dropout", self._dropout),
                ("tests", self._tests),
                ("benchmarks", self._benchmarks),
                ("sanitizer", self._sanitizer),
            ]
            for name, step in steps:
                self._step(name, step, runner)

    def _left(self) -> float:
        return self._end - time.perf_counter()

    def _step(self, name: str, step: Callable[[Runner, float], str], runner: Runner) -> None:
        started = time.perf_counter()
        part = self.budget * _PARTS.get(name, 1.0)
        if name == "benchmarks":
            part = self._left() - self.budget * _PARTS["sanitizer"]
        part = min(part, self._left())
        print(f"{name}: {max(0.0, part):.0f} s at most", file=sys.stderr, flush=True)
        record = {"name": name, "status": workers.OK, "reason": "", "seconds": 0.0}
        self._data["steps"].append(record)
        if part <= 1:
            record |= {"status": "stopped", "reason": "the budget was spent before"}
        else:
            try:
                if reason := step(runner, part):
                    record |= {"status": reason.partition(":")[0], "reason": reason}
            except Exception as error:  # the next step may still show something
                failed = workers.failure(error)
                record |= {"status": workers.FAILED, "reason": failed.reason}
        record["seconds"] = round(time.perf_counter() - started, 1)
        self.document.save()

    def _call(self, runner: Runner, function: Callable, part: float) -> object:
        outcome = runner.pool().run(function, self.device, timeout=part)
        if outcome.status != workers.OK:
            raise RuntimeError(f"{outcome.status}: {outcome.reason}")
        return outcome.value

    # Each step returns "" or "status: reason".

    def _environment(self, runner: Runner, part: float) -> str:
        self._data["environment"] = self._call(runner, points.describe, part)
        return ""

    def _ceilings(self, runner: Runner, part: float) -> str:
        self._data["ceilings"] = self._call(runner, ceilings.measure, part)
        return ""

    def _dropout(self, runner: Runner, part: float) -> str:
        found = self._data["dropout"] = self._call(runner, gpu_checks.dropout, part)
        assert isinstance(found, list)
        wrong = [row for row in found if row["differing"] or abs(row["deviation"]) > 5]
        return f"failed: {len(wrong)} masks are not those of the contract" if wrong else ""

    def _tests(self, runner: Runner, part: float) -> str:
        if not (gpu_tests.ROOT / "tests").is_dir():
            return "not available: the tests come with a checkout alone"
        names = gpu_tests.files()
        if self.device == "cpu":
            names = ["test_dropout.py"]  # enough to exercise the step
        found = gpu_tests.run(names, part, self.out / "tests.jsonl")
        self._data["tests"] = found
        if found["problems"]:
            return f"failed: {len(found['problems'])} tests"
        return f"{found['state']}: {found['reason']}" if found["state"] != "complete" else ""

    def _benchmarks(self, runner: Runner, part: float) -> str:
        runner.limits.budget, runner.started = part, time.perf_counter()
        self._data["rows"] = runner.rows
        entries = suites.SUITES["gpu"](self.quick, self.device)
        if self.device == "cpu":
            peers = ((entry, default_baseline(entry.op)) for entry in entries[::5])
            entries = [entry.at(impls=("fused", peer), baseline=peer) for entry, peer in peers]
        for _ in runner.run(entries, lambda entry: print(" ", entry.named(), file=sys.stderr)):
            self.document.save()
        bad = [row for row in runner.rows if row["impl"] == "fused" and row["status"] != workers.OK]
        reasons = sorted({row["status"] for row in bad})
        return f"{reasons[-1]}: {len(bad)} problems, {', '.join(reasons)}" if bad else ""

    def _sanitizer(self, runner: Runner, part: float) -> str:
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if self.device == "cpu":
            self._call(runner, gpu_checks.odd_shapes, part)
            return "not available: compute-sanitizer needs a GPU; the shapes ran without it"
        if not Path(tool).is_file():
            return "not available: there is no compute-sanitizer"
        end = time.perf_counter() + part
        for name in _SANITIZERS[: 1 if self.quick else None]:
            self._data["sanitizer"].append(_sanitize(tool, name, end - time.perf_counter()))
        bad = [found for found in self._data["sanitizer"] if found["status"] != workers.OK]
        return f"{bad[0]['status']}: {bad[0]['tool']}: {bad[0]['reason']}" if bad else ""


def _sanitize(tool: str, name: str, left: float) -> dict:
    """One tool of compute-sanitizer over gpu_checks.odd_shapes()."""
    command = [tool, f"--tool={name}", "--error-exitcode=99", "--print-limit=20"]
    command += [sys.executable, "-m", "fusedformer.benchmarks.gpu_checks"]
    # Allocations of their own, so that a read past the end of one is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = {"tool": name, "status": workers.OK, "reason": "", "output": ""}
    try:
        done = subprocess.run(
            command, cwd=gpu_tests.ROOT, env=environment, capture_output=True, text=True,
            timeout=max(1.0, left),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return found | {"status": "stopped", "reason": f"not done after {left:.0f} s"}
    found["output"] = (done.stdout + done.stderr)[-4000:]
    if done.returncode:
        found |= {"status": workers.FAILED, "reason": f"exit code {done.returncode}"}
    return found


def summary(data: dict) -> list[Table]:
    """What the terminal shows of a run."""
    body = [
        [step["name"], step["status"], f"{step['seconds']:.0f}", step["reason"].partition("\n")[0]]
        for step in data["steps"]
    ]
    found = [Table("Steps", ["step", "status", "s", ""], body)]
    if data["rows"]:
        found += [*bench_tables.details(data), *bench_tables.reach(data)]
    if data["tests"]:
        problems = [
            [held["test"], held["reason"].partition("\n")[0]] for held in data["tests"]["problems"]
        ]
        counts = ", ".join(f"{count} {what}" for what, count in data["tests"]["counts"].items())
        found.append(Table(f"Tests: {counts}", ["failed", ""], problems))
    return found
