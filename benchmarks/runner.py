"""Measures the entries of a suite, one by one; what fails is a row, not an end."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from typing_extensions import Self

from fusedformer.benchmarks import gpu_state, measure, timing, workers
from fusedformer.benchmarks.entries import OVERHEAD, TIME, Entry, default_baseline
from fusedformer.benchmarks.ops import common
from fusedformer.benchmarks.ops.registry import OPS
from fusedformer.benchmarks.workers import Outcome, Workers

NOT_HERE, WRONG, DOES_NOT_FIT, OVER_BUDGET = (
    "not available", "wrong result", "does not fit", "over budget",
)  # fmt: skip
_MEMORY_SHARE = 0.9

# What holds torch's own libraries to an instruction set; read when they are loaded.
ISA_ENVIRONMENT = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}


@dataclass
class Limits:
    """How long to measure.

    Args:
        seconds: of rounds for one entry.
        min_rounds, max_rounds: bounds on the rounds of one entry, whatever the time.
        call: seconds after which one call of a worker is ended.
        budget: seconds for all; what comes after is a row that says so.
    """

    seconds: float = 5.0
    min_rounds: int = 3
    max_rounds: int = 30
    call: float = 300.0
    budget: float = math.inf


def worth_keeping(rows: list[dict]) -> list[dict]:
    """The rows of a run before, without those of entries that its budget cut short."""
    cut = {row["key"] for row in rows if row["status"] == OVER_BUDGET}
    return [row for row in rows if row["key"] not in cut]


@dataclass
class Runner:
    """Measures entries one by one; a context manager.

    Args:
        device: "cpu" or "cuda".
        limits: how long.
        rows: of a run before, which entries keep; grows.
    """

    device: str
    limits: Limits
    rows: list[dict] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    _hung: dict[tuple[str, str], str] = field(default_factory=dict)
    _pools: dict[str, Workers] = field(default_factory=dict)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.limits.budget - (time.perf_counter() - self.started)

    def pool(self, isa: str = "") -> Workers:
        """Where measurements run that are held to an instruction set."""
        if isa not in self._pools:
            workers_here = Workers(self.device == "cpu", ISA_ENVIRONMENT.get(isa))
            self._pools[isa] = self._stack.enter_context(workers_here)
        return self._pools[isa]

    def run(self, entries: list[Entry], before: Callable[[Entry], None]) -> Iterator[None]:
        """Measures what has no rows yet; yields whenever rows have changed."""
        done = {row["key"] for row in self.rows}
        for entry in entries:
            if entry.key() in done:
                continue
            before(entry)
            self.rows += self.entry(entry)
            yield

    def _call(self, entry: Entry, function: Callable, *args: Any) -> Outcome:
        timeout = min(self.limits.call, max(1.0, self.left()))
        outcome = self.pool(entry.isa).run(function, *args, timeout=timeout)
        if outcome.status == workers.TOO_SLOW and timeout < self.limits.call:
            return Outcome(OVER_BUDGET, reason="the budget ended while it ran")
        return outcome

    def entry(self, entry: Entry) -> list[dict]:
        """The rows of one entry."""
        op = OPS[entry.op]
        names = list(entry.impls or op.impls)
        rows = {name: new_row(entry, name) for name in names}
        if self.left() <= 0:
            return _end(rows, Outcome(OVER_BUDGET, reason="the budget was spent before"))
        looked = self._call(entry, measure.look, entry.op, names, entry.case)
        if looked.status != workers.OK:
            return _end(rows, looked)
        refusals, available = looked.value
        limit = self._call(entry, measure.limits, entry.op, entry.case, entry.mode)
        going = []
        for name, row in rows.items():
            needed = op.peak(name, entry.case)
            if where := self._hung.get((entry.op, name)):
                row |= {"status": NOT_HERE, "reason": f"it was not done in time before: {where}"}
            elif refusals[name]:
                row |= {"status": NOT_HERE, "reason": refusals[name]}
            elif available is not None and needed > _MEMORY_SHARE * available:
                row |= {
                    "status": DOES_NOT_FIT,
                    "reason": f"needs about {needed / 1e9:.1f} GB; {available / 1e9:.1f} GB "
                    "are available",
                }
            elif self._first(entry, row, limit):
                going.append(name)
        if entry.quantity in (TIME, OVERHEAD) and going:
            self._time(entry, {name: rows[name] for name in going})
        return list(rows.values())

    def _first(self, entry: Entry, row: dict, limit: Outcome) -> bool:
        """Memory and errors of an implementation; whether it may be timed."""
        args = (entry.op, row["impl"], entry.case, entry.mode, entry.isa)
        found = self._call(entry, measure.first, *args)
        if found.status != workers.OK or limit.status != workers.OK:
            failed = found if found.status != workers.OK else limit
            row |= {"status": failed.status, "reason": failed.reason}
            if found.status == workers.TOO_SLOW:
                self._leave_out(entry, row["impl"])
            return False
        row["label"] = found.value["label"]
        row["error"] = found.value["error"] | {"limit": limit.value}
        if wrong := measure.verdict(row["error"], limit.value):
            row |= {"status": WRONG, "reason": wrong}
            return False
        row["memory"] = found.value["memory"]
        return True

    def _timed(self, entry: Entry, names: list[str]) -> dict[str, Outcome]:
        limits, host = self.limits, entry.quantity == OVERHEAD
        timed = self._call(
            entry, measure.times, entry.op, names, entry.case, entry.mode, entry.isa, host,
            limits.seconds, limits.min_rounds, limits.max_rounds,
        )  # fmt: skip
        return timed.value if timed.status == workers.OK else dict.fromkeys(names, timed)

    def _leave_out(self, entry: Entry, impl: str) -> None:
        """From further problems of a GPU's run, whose time one that hangs would take again."""
        if self.device == "cuda":
            self._hung[entry.op, impl] = entry.named()

    def _time(self, entry: Entry, rows: dict[str, dict]) -> None:
        with gpu_state.watched(self.device) as state:
            outcomes = self._timed(entry, list(rows))
            # They share a process: what hangs or breaks the GPU's context takes the others along.
            # The newest kernels are the first that one suspects.
            suspects = [name for name in rows if common.forced_backend(name) == "cuda"]
            if suspects and len(rows) > len(suspects) and any(map(_shared, outcomes.values())):
                for name in suspects:
                    if outcomes[name].status == workers.TOO_SLOW:
                        self._leave_out(entry, name)
                outcomes |= self._timed(entry, [name for name in rows if name not in suspects])
        for name, row in rows.items():
            row["gpu"] = state or None
            outcome = outcomes[name]
            if outcome.status == workers.OK:
                row["ms"] = timing.summary(outcome.value["ms"])
            else:
                row |= {"status": outcome.status, "reason": outcome.reason}


def _shared(outcome: Outcome) -> bool:
    """Whether what ended a measurement ended those beside it, too."""
    ended = outcome.status == workers.TOO_SLOW or outcome.reason.startswith("the process")
    return ended or "CUDA error" in outcome.reason


def new_row(entry: Entry, name: str) -> dict:
    """The row of an implementation before anything was measured."""
    op = OPS[entry.op]
    return {
        "key": entry.key(),
        "title": entry.named(),
        "op": entry.op,
        "mode": entry.mode,
        "quantity": entry.quantity,
        "isa": entry.isa or None,
        "case": entry.case.as_dict(),
        "baseline": entry.baseline or default_baseline(entry.op),
        "goals": [asdict(goal) for goal in entry.goals if goal.impl == name],
        "flops": op.flops(entry.case, entry.mode),
        "bytes": op.moved(entry.case, entry.mode),
        "impl": name,
        "label": name,
        "version": op.impls[name].version(),
        "status": workers.OK,
        "reason": "",
    }


def _end(rows: dict[str, dict], outcome: Outcome) -> list[dict]:
    return [row | {"status": outcome.status, "reason": outcome.reason} for row in rows.values()]
