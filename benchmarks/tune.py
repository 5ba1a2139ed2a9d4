"""Times what the launchers of the Triton kernels may choose, beside what they do choose.

    python -m fusedformer.benchmarks.tune --out DIR --budget 480

Candidates are compiled by all cores, in the order of tune_branches.branches(). One that does not
compile, or spills, is left out; one whose results are not those of the launcher's own choice does
not count; the rest take turns, from a cold L2 cache. On a machine without a GPU all are compiled
for sm_90 and none is timed.
"""

import argparse
import contextlib
import functools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fusedformer import aot
from fusedformer.benchmarks import points, terminal, timing, tune_branches, workers
from fusedformer.benchmarks.document import COMPLETE, CUT, Document
from fusedformer.benchmarks.gpu import INTERRUPTED, terminated_as_interrupted
from fusedformer.benchmarks.options import device_of, make_folder, seconds
from fusedformer.benchmarks.tables import Table, number

KIND = "tune"
BUDGET = 480.0
OWN = -1  # the index of what the launcher chooses by itself

# Statuses of a row beside workers.OK and workers.FAILED.
LEFT_OUT, DIFFERS, COMPILED = "left out", "differs", "compiled"

_CHECK_SECONDS = 40.0  # that a candidate may take to run once, in a process that starts
_TIMED_SECONDS = 2.5  # for the rounds of a branch


# --- In other processes ---------------------------------------------------------------------------


@functools.cache
def _branches() -> dict[str, tune_branches.Branch]:
    return {branch.name: branch for branch in tune_branches.branches()}


def _candidate(branch: tune_branches.Branch, index: int) -> Any:
    return None if index == OWN else branch.candidates[index]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Within the block, what a compiler that gives up says goes nowhere: it is a whole program."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _Driver:
    """What Triton asks of a GPU before it compiles for one."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)


def ahead(entry: Any, capability: int) -> Any:
    """Compiles a recorded launch as the launch would, so that it finds it; needs no GPU."""
    from triton.runtime import driver

    driver.set_active(_Driver(capability))
    return entry.kernel.warmup(*entry.args, grid=entry.grid, **entry.options)


def compile_candidate(name: str, index: int, capability: int, multiprocessors: int) -> aot.Report:
    """Compiles what a branch would launch, into the cache from which a launch takes it."""
    from fusedformer.kernels.triton import launch

    branch, chip = _branches()[name], launch.Chip(capability, multiprocessors)
    with launch.recording(chip):
        call = branch.make("meta")
    _, entries, *_ = tune_branches.launches(branch, _candidate(branch, index), call, chip)
    with _silent():
        return aot.compile_launch(name, 16, capability, entries[0], ahead)


@functools.lru_cache(maxsize=1)
def _held(name: str) -> "tuple[tune_branches.Call, tuple]":
    """The call of a branch on its inputs, and its outputs with the launcher's own choice."""
    torch.manual_seed(0)
    call = _branches()[name].make("cuda")
    return call, _run(name, OWN, call)[1]


def _run(name: str, index: int, call: tune_branches.Call) -> "tuple[Any, tuple]":
    """The launch of a candidate, once run, and what it wrote."""
    from fusedformer.kernels.triton import launch

    branch, chip = _branches()[name], launch.chip(torch.device("cuda"))
    candidate = _candidate(branch, index)
    before, own, after, outputs = tune_branches.launches(branch, candidate, call, chip)
    for entry in (*before, *own, *after):
        launch.launch(entry.kernel, entry.grid, *entry.args, **entry.options)
    torch.cuda.synchronize()
    return own[0], outputs


def check(name: str, index: int) -> float:
    """How far a candidate's outputs lie from those of the launcher's own choice.

    Returns:
        The largest, over outputs, of |difference| / |output| (root mean squares), in units of the
        resolution of the output's dtype; infinite where one is not finite.
    """
    call, wanted = _held(name)
    _, found = _run(name, index, call)
    most = 0.0
    for a, b in zip(found, wanted, strict=True):
        # LSE and its like are float32, but made of 16-bit numbers.
        unit = torch.finfo(torch.bfloat16).eps
        distance = (a.float() - b.float()).norm() / b.float().norm() / unit
        most = max(most, distance.item() if torch.isfinite(distance) else float("inf"))
    return most


def time_candidates(name: str, indices: list[int]) -> dict[int, dict]:
    """Milliseconds of candidates that take turns: "median", "p20", "p80" and how many "rounds"; or
    {"error": why}."""
    from fusedformer.kernels.triton import launch

    call, _ = _held(name)
    entries = {str(index): _run(name, index, call)[0] for index in indices}
    samples = {
        index: timing.whole(
            [functools.partial(launch.launch, e.kernel, e.grid, *e.args, **e.options)]
        )
        for index, e in entries.items()
    }
    found = timing.time_interleaved(
        samples, timing.clock_for("cuda"), seconds=_TIMED_SECONDS, min_rounds=5, max_rounds=25,
        warmup=2,
    )  # fmt: skip
    return {int(index): _summary(held) for index, held in found.items()}


def _summary(held: dict) -> dict:
    """Without the samples, which thousands of candidates would fill megabytes with."""
    if "error" in held:
        return {"error": str(held["error"])}
    summary = timing.summary(held["ms"])
    return {"rounds": len(summary.pop("samples"))} | summary


# --- The run --------------------------------------------------------------------------------------


def row_of(branch: tune_branches.Branch, index: int, report: aot.Report) -> dict:
    """What the document says of a candidate that was compiled."""
    candidate = {} if index == OWN else tune_branches.described(branch.candidates[index])
    row = {
        "branch": branch.name,
        "own": index == OWN,
        "candidate": candidate or report.options,
        "kernel": report.kernel,
        "registers": report.registers,
        "stack": report.stack,
        "shared": report.shared,
        "matrix": report.matrix,
        "operations": branch.operations,
        "status": LEFT_OUT if report.faults else COMPILED,
        "reason": "; ".join(report.faults),
    }
    if index == OWN:  # whatever it breaks, it is what runs
        row["status"] = COMPILED
    return row


def _measure(
    pool: workers.Workers, branch: tune_branches.Branch, rows: dict[int, dict], hung: set[str]
) -> None:
    """Fills in "difference" and "ms" of the rows, by index, that were compiled.

    ``hung`` are choosers of which a candidate with specialized warps, which wait for each other,
    did not end: each one more would take as long.
    """
    ready = [index for index, row in rows.items() if row["status"] == COMPILED]
    for index in ready:
        row = rows[index]
        specialized = row["candidate"].get("specialized", False)
        if specialized and branch.chooser in hung:
            row |= {"status": workers.FAILED, "reason": "not tried: one like it did not end"}
            continue
        outcome = pool.run(check, branch.name, index, timeout=_CHECK_SECONDS)
        if outcome.status != workers.OK:
            row |= {"status": workers.FAILED, "reason": outcome.reason}
            if specialized and outcome.status == workers.TOO_SLOW:
                hung.add(branch.chooser)
        else:
            row["difference"] = outcome.value
            # The results of other tiles differ by roundings: less than a unit.
            row["status"] = workers.OK if outcome.value < 1 else DIFFERS
    good = [index for index in ready if rows[index]["status"] == workers.OK]
    if not good:
        return
    outcome = pool.run(time_candidates, branch.name, good, timeout=4 * _CHECK_SECONDS)
    for index in good:
        held = outcome.value[index] if outcome.status == workers.OK else {"error": outcome.reason}
        if "error" in held:
            rows[index] |= {"status": workers.FAILED, "reason": held["error"]}
        else:
            rows[index]["ms"] = held


def collect(
    document: Document,
    chosen: list[tune_branches.Branch],
    chip: tuple[int, int],
    timed: bool,
    end: float,
    jobs: int,
) -> None:
    """Compiles and times branch after branch until ``end``, and saves after each.

    Args:
        document: its "rows" and "stopped" are filled.
        chosen: the branches, in their order.
        chip: capability and multiprocessors.
        timed: whether there is a GPU to time on.
        end: in time.perf_counter()'s seconds.
        jobs: processes that compile.
    """
    tasks = [
        (branch.name, index, *chip)
        for branch in chosen
        for index in (OWN, *range(len(branch.candidates)))
    ]

    def crashed(name: str, index: int, *chip: int) -> aot.Report:
        return aot.Report(name, "-", chip[0], 16, {}, faults=["the compiler crashed"])

    hung: set[str] = set()
    reports = aot.in_workers(compile_candidate, tasks, jobs, crashed)
    try:
        with workers.Workers(fresh=False) as pool:
            for branch in chosen:
                if time.perf_counter() > end:
                    document.data["stopped"].append(branch.name)
                    continue
                rows = {
                    index: row_of(branch, index, next(reports))
                    for index in (OWN, *range(len(branch.candidates)))
                }
                document.data["rows"] += rows.values()
                if timed:
                    _measure(pool, branch, rows, hung)
                document.save()
                terminal.show([table(branch.name, list(rows.values()))])
    finally:
        reports.close()


def table(name: str, rows: list[dict], most: int = 8) -> Table:
    """A branch's candidates, fastest first; its own choice and the failures are always there."""
    own = next(row for row in rows if row["own"])
    speed = {id(row): row["ms"]["median"] for row in rows if "ms" in row}
    ranked = sorted((row for row in rows if "ms" in row), key=lambda row: speed[id(row)])
    failed = [row for row in rows if row["status"] in (workers.FAILED, DIFFERS)]
    shown = ranked[:most] + [row for row in ranked[most:] if row["own"]] + failed
    if not ranked:
        shown = [row for row in rows if row["status"] == COMPILED]
    body = [
        [
            " ".join(f"{k}={v}" for k, v in row["candidate"].items()) if not row["own"] else "own",
            number(speed.get(id(row))),
            f"{speed[id(own)] / speed[id(row)]:.3f}" if {id(row), id(own)} <= set(speed) else "—",
            number(row["operations"] / speed[id(row)] / 1e9) if id(row) in speed else "—",
            str(row["registers"]), str(row["shared"]), row["matrix"],
            f"{row['status']}: {row['reason']}" if row in failed else "",
        ]
        for row in shown
    ]  # fmt: skip
    head = ["candidate", "ms", "own / it", "TFLOP/s", "regs", "shared", "matrix", ""]
    left = sum(row["status"] == LEFT_OUT for row in rows)
    notes = (f"{len(rows)} in all, {left} left out: they spill, do not fit or do not compile.",)
    return Table(name, head, body, notes)


def summary(rows: list[dict]) -> Table:
    """What the launchers choose and what was fastest, of each branch that was timed."""
    body = []
    for name in dict.fromkeys(row["branch"] for row in rows):
        timed = [row for row in rows if row["branch"] == name and "ms" in row]
        own = [row for row in timed if row["own"]]
        if own:
            best = min(timed, key=lambda row: row["ms"]["median"])
            ratio = own[0]["ms"]["median"] / best["ms"]["median"]
            what = " ".join(f"{k}={v}" for k, v in best["candidate"].items())
            said = "own" if best["own"] else what
            body.append([name, number(own[0]["ms"]["median"]), f"{ratio:.3f}", said])
    return Table("Own choice over the fastest", ["branch", "own ms", "own / best", "best"], body)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument
    add("--out", metavar="DIR", default="tune", help="where tune.json goes (tune)")
    add("--budget", metavar="SECONDS", help=f"after which no branch begins ({BUDGET:g})")
    add("--only", default="", metavar="TEXT", help="branches whose name holds TEXT")
    # One core is for the process that times, one for this one.
    jobs = max(1, (os.cpu_count() or 1) - 2)
    add("--jobs", type=int, default=jobs, help=f"processes that compile ({jobs})")
    add("--device", default="auto", help="auto, cpu (compiles for sm_90 alone) or cuda (auto)")


def run(args: argparse.Namespace) -> int:
    """Measures; the exit code is 130 where it was cut off, what was measured being kept.

    Raises:
        ValueError: an option is wrong; the text is one sentence that names it.
    """
    device = device_of(args.device)
    budget = BUDGET if args.budget is None else seconds("--budget", args.budget)
    if args.jobs < 1:
        raise ValueError(f"--jobs must be 1 or more; got {args.jobs}")
    chosen = [branch for branch in tune_branches.branches() if args.only in branch.name]
    if not chosen:
        raise ValueError(f"--only: no branch's name holds {args.only!r}")
    capability, multiprocessors = 90, aot.MULTIPROCESSORS[90]
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        capability = 10 * properties.major + properties.minor
        multiprocessors = properties.multi_processor_count
        if capability not in aot.SHARED_LIMIT:
            raise ValueError(f"--device: no limits are known of sm_{capability}")
    end = time.perf_counter() + budget
    out = Path(args.out)
    make_folder(out)
    options = {"budget": budget, "device": device, "only": args.only}
    facts = points.describe(device)
    document = Document(out / "tune.json", KIND, options, facts, rows=[], stopped=[])
    chip = (capability, multiprocessors)
    state = COMPLETE
    try:
        with terminated_as_interrupted():
            collect(document, chosen, chip, device == "cuda", end, args.jobs)
    except KeyboardInterrupt:
        state = CUT
    document.finish(state)
    if device == "cuda":
        terminal.show([summary(document.data["rows"])])
    if document.data["stopped"]:
        print(f"{len(document.data['stopped'])} branches did not begin: the budget was spent")
    print(f"{document.data['seconds']:.0f} s. Written: {document.path}")
    return INTERRUPTED if state == CUT else 0


def main() -> int:
    """``python -m fusedformer.benchmarks.tune``"""
    parser = argparse.ArgumentParser(prog="tune", description=(__doc__ or "").partition("\n")[0])
    configure(parser)
    try:
        return run(parser.parse_args())
    except ValueError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    # Under the name that the processes import it by.
    from fusedformer.benchmarks import tune

    sys.exit(tune.main())
