"""``fusedformer gpu``: all that only a GPU can show, in one run, in one JSON file.

Environment and ceilings, the kernels that want a compiler, dropout's masks and rates, the tests
that need a GPU, the benchmarks beside torch's own, a sanitizer on small shapes, training steps of
whole models: what matters most first, each step within its part of a time budget. A step that
fails is recorded and the next one runs; what was measured is on disk after each. On a CPU it does
the same, smaller.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from fusedformer.benchmarks import (
    bench_tables,
    ceilings,
    gpu_checks,
    gpu_suite,
    gpu_tests,
    points,
    terminal,
    workers,
)
from fusedformer.benchmarks.document import COMPLETE, CUT, Document
from fusedformer.benchmarks.entries import Entry, default_baseline
from fusedformer.benchmarks.ops import common
from fusedformer.benchmarks.options import device_of, make_folder, seconds
from fusedformer.benchmarks.runner import NOT_HERE, Limits, Runner
from fusedformer.benchmarks.tables import Table

KIND = "gpu"
INTERRUPTED = 130
BUDGET, QUICK_BUDGET = 500.0, 110.0

STEPS = (
    "environment", "ceilings", "build", "dropout", "tests", "benchmarks", "sanitizer", "models",
)  # fmt: skip
# These are run where they are asked for: they need all of the time.
ON_REQUEST = ("tune",)
# The part of the budget that a step may take; the benchmarks take what is left but for the
# sanitizer's part, the models what is left at the end.
_PARTS = {
    "environment": 0.1, "ceilings": 0.1, "build": 0.2, "dropout": 0.08, "tests": 0.3,
    "sanitizer": 0.1,
}  # fmt: skip
_SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
_MOST_PROBLEMS = 25  # that the terminal lists; the file has all


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument
    add("--out", metavar="DIR", default="gpu", help="where gpu.json goes (gpu)")
    add("--quick", action="store_true", help="in two minutes instead of nine")
    said = f"for all steps ({BUDGET:g}; --quick: {QUICK_BUDGET:g})"
    add("--budget", metavar="SECONDS", help=said)
    add("--steps", metavar="NAME,...", help=f"these alone, of {', '.join(STEPS + ON_REQUEST)}")
    add("--device", default="auto", help="auto, cpu or cuda (auto)")


def run(args: argparse.Namespace) -> int:
    """Runs all steps; the exit code is 1 where one of them failed.

    Raises:
        ValueError: an option is wrong; the text is one sentence that names it.
    """
    device = device_of(args.device)
    default = QUICK_BUDGET if args.quick else BUDGET
    budget = default if args.budget is None else seconds("--budget", args.budget)
    asked = STEPS if args.steps is None else tuple(args.steps.split(","))
    every = STEPS + ON_REQUEST
    if unknown := [name for name in asked if name not in every]:
        raise ValueError(f"--steps must be of {', '.join(every)}; got {unknown[0]!r}")
    out = Path(args.out)
    make_folder(out)
    evidence = Evidence(device, args.quick, budget, out, asked)
    try:
        with terminated_as_interrupted():
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


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Within the block, SIGTERM ends as Ctrl-C does: what was started is ended, what is known kept.

    That is what a batch system and `timeout` send.
    """

    def interrupt(*args: Any) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Evidence:
    """One run: its document, and the steps that fill it.

    Args:
        device: "cpu" or "cuda".
        quick: fewer problems.
        budget: seconds for all.
        out: the folder of gpu.json.
        asked: names of steps.
    """

    def __init__(
        self,
        device: str,
        quick: bool,
        budget: float,
        out: Path,
        asked: "tuple[str, ...]" = STEPS,
    ) -> None:
        self.device, self.quick, self.budget, self.out = device, quick, budget, out
        self._asked = asked
        self._end = time.perf_counter() + budget
        options = {"quick": quick, "budget": budget, "device": device, "steps": list(asked)}
        self.document = Document(
            out / "gpu.json", KIND, options, {}, ceilings=None, steps=[], dropout=[], build=None,
            tests=None, rows=[], sanitizer=[],
        )  # fmt: skip
        self._data = self.document.data
        self._builder: subprocess.Popen | None = None

    def collect(self) -> None:
        """Runs the steps in order; a step that raises is recorded."""
        limits = Limits(seconds=1.0 if self.quick else 1.5, min_rounds=3, call=75.0)
        try:
            if "build" in self._asked:
                self._start_build()
            with Runner(self.device, limits) as runner:
                for name in STEPS + ON_REQUEST:
                    if name in self._asked:
                        self._step(name, getattr(self, f"_{name}"), runner)
        finally:
            if self._builder is not None:
                workers.end_group(self._builder)

    def _left(self) -> float:
        return self._end - time.perf_counter()

    def _step(self, name: str, step: Callable[[Runner, float], str], runner: Runner) -> None:
        started = time.perf_counter()
        part = self.budget * _PARTS.get(name, 1.0)
        if name == "benchmarks" and "sanitizer" in self._asked:
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

    def _start_build(self) -> None:
        """Begins to compile: the first steps need nothing of it, and take as long."""
        with (self.out / "build.txt").open("w") as output:
            self._builder = subprocess.Popen(
                [sys.executable, "-m", "fusedformer", "build", self.device], cwd=gpu_tests.ROOT,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def _build(self, runner: Runner, part: float) -> str:
        assert self._builder is not None
        try:
            code = self._builder.wait(part)
        except subprocess.TimeoutExpired:
            return f"stopped: not done after {part:.0f} s; it goes on beside the next steps"
        self._data["build"] = (self.out / "build.txt").read_text(errors="replace")[-4000:]
        said = self._data["build"].strip().splitlines() or [f"exit code {code}"]
        return f"failed: {said[-1]}" if code else ""

    def _tests(self, runner: Runner, part: float) -> str:
        if reason := gpu_tests.missing():
            return f"not available: {reason}"
        names, log, gpu = gpu_tests.files(), self.out / "tests.jsonl", self.device == "cuda"
        if not gpu:
            names = ["test_dropout.py"]  # enough to exercise the step
        try:
            found = gpu_tests.run(names, part, log, slow=gpu, processes=12 if gpu else 2)
        except KeyboardInterrupt:
            self._data["tests"] = {"state": "stopped", "reason": "", **gpu_tests.read(log)}
            raise
        self._data["tests"] = found
        if found["problems"]:
            return f"failed: {len(found['problems'])} tests"
        return f"{found['state']}: {found['reason']}" if found["state"] != "complete" else ""

    def _benchmarks(self, runner: Runner, part: float) -> str:
        entries = gpu_suite.suite(self.quick, self.device)
        return self._measure(runner, part, entries[::5] if self.device == "cpu" else entries)

    def _models(self, runner: Runner, part: float) -> str:
        runner.limits.call = part  # torch.compile takes long
        return self._measure(runner, part, gpu_suite.trained(self.quick, self.device))

    def _measure(self, runner: Runner, part: float, entries: list[Entry]) -> str:
        runner.limits.budget, runner.started = part, time.perf_counter()
        self._data["rows"], before = runner.rows, len(runner.rows)
        if self.device == "cpu":
            peers = ((entry, default_baseline(entry.op)) for entry in entries)
            entries = [entry.at(impls=("fused", peer), baseline=peer) for entry, peer in peers]
        for _ in runner.run(entries, lambda entry: print(" ", entry.named(), file=sys.stderr)):
            self.document.save()
        fine = (workers.OK, NOT_HERE)
        own = [row for row in runner.rows[before:] if common.ours(row["impl"])]
        bad = [row for row in own if row["status"] not in fine]
        reasons = sorted({row["status"] for row in bad})
        return f"{reasons[-1]}: {len(bad)} problems, {', '.join(reasons)}" if bad else ""

    def _tune(self, runner: Runner, part: float) -> str:
        """Files of their own: a run of these replaces no evidence."""
        if self.device == "cpu":
            return "not available: choices are timed on a GPU"
        end, bad = time.perf_counter() + part, []
        for name, command in tuners(self.out, part).items():
            with (self.out / name).with_suffix(".txt").open("w") as output:
                process = subprocess.Popen(
                    command, cwd=gpu_tests.ROOT, stdout=output, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
                try:
                    # What one of them leaves of its part is the other's; both save as they go.
                    if code := process.wait(max(1.0, end - time.perf_counter())):
                        bad.append(f"{name}: exit code {code}")
                except subprocess.TimeoutExpired:
                    bad.append(f"{name}: it was not done when the time was up")
                finally:
                    workers.end_group(process)
        return f"failed: {'; '.join(bad)}" if bad else ""

    def _sanitizer(self, runner: Runner, part: float) -> str:
        if self.device == "cpu":
            self._call(runner, gpu_checks.odd_shapes, part)
            return "not available: compute-sanitizer needs a GPU; the shapes ran without it"
        tool = shutil.which("compute-sanitizer", path=_with_cuda(os.environ.get("PATH", "")))
        if tool is None:
            return "not available: there is no compute-sanitizer"
        end = time.perf_counter() + part
        # First without a tool: each kernel is compiled once then, and what fails anyway is told.
        self._call(runner, gpu_checks.odd_shapes, part)
        self._data["sanitizer"] = _sanitize(tool, _SANITIZERS[: 1 if self.quick else None], end)
        bad = [found for found in self._data["sanitizer"] if found["status"] != workers.OK]
        return f"{bad[0]['status']}: {bad[0]['tool']}: {bad[0]['reason']}" if bad else ""


def tuners(out: Path, seconds: float) -> dict[str, list[str]]:
    """By the file that they write: the commands that time the launchers' choices, Triton's, then
    those of CUDA C++; in so many seconds, of which each is given a part."""
    triton = ["fusedformer.benchmarks.tune", f"--out={out}", f"--budget={0.6 * seconds:.0f}"]
    cuda = ["fusedformer.benchmarks.tune_cuda", f"--out={out / 'tune_cuda.json'}"]
    cuda += [f"--seconds={0.3 * seconds:.0f}"]
    return {
        "tune.json": [sys.executable, "-m", *triton],
        "tune_cuda.json": [sys.executable, "-m", *cuda],
    }


def _sanitize(tool: str, names: tuple[str, ...], end: float) -> list[dict]:
    """Tools of compute-sanitizer over gpu_checks.odd_shapes(), side by side until ``end``: each
    takes long, and little of the GPU."""
    # Allocations of their own, so that a read past the end of one is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with contextlib.ExitStack() as stack:
        running = []
        for name in names:
            command = [tool, f"--tool={name}", "--error-exitcode=99", "--print-limit=20"]
            command += [sys.executable, "-m", "fusedformer.benchmarks.gpu_checks"]
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                command, cwd=gpu_tests.ROOT, env=environment, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            stack.callback(workers.end_group, process)  # its child, too, which holds the GPU
            running.append((name, process, output))
        return [_sanitized(*one, end) for one in running]


def _sanitized(name: str, process: subprocess.Popen, output: IO[str], end: float) -> dict:
    """What a tool says once it has ended, or its time has."""
    found = {"tool": name, "status": workers.OK, "reason": ""}
    try:
        if code := process.wait(max(1.0, end - time.perf_counter())):
            found |= {"status": workers.FAILED, "reason": f"exit code {code}"}
    except subprocess.TimeoutExpired:
        found |= {"status": "stopped", "reason": "it was not done when the time was up"}
    output.seek(0)
    return found | {"output": output.read()[-4000:]}


def _with_cuda(path: str) -> str:
    """The search path with the folders of the CUDA toolkit after it."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    return os.pathsep.join([path, *(f"{home}/bin" for home in homes if home)])


def summary(data: dict) -> list[Table]:
    """What the terminal shows of a run."""
    body = [
        [step["name"], step["status"], f"{step['seconds']:.0f}", step["reason"].partition("\n")[0]]
        for step in data["steps"]
    ]
    found = []
    if data["rows"]:
        found += [*bench_tables.details(data), *bench_tables.reach(data)]
    if data["tests"]:
        problems = [
            [held["test"], held["reason"].partition("\n")[0]] for held in data["tests"]["problems"]
        ]
        counts = ", ".join(f"{count} {what}" for what, count in data["tests"]["counts"].items())
        more = len(problems) - _MOST_PROBLEMS
        notes = (f"And {more} more.",) if more > 0 else ()
        shown = problems[:_MOST_PROBLEMS] or [["none", ""]]
        found.append(Table(f"Tests: {counts}", ["failed", ""], shown, notes))
    # Last, where a terminal's end shows it.
    return [*found, Table("Steps", ["step", "status", "s", ""], body)]
