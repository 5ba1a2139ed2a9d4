"""Walks a sweep within a time budget: every point once, then again for as long as time is left.

Each point is one attention problem. The first pass measures the peak memory of every
implementation in a process of its own and takes first times; later passes add times, so that a
slow phase of the machine falls on all lengths alike and not on those that had their turn in it.
What would not fit in memory, or in the time left, is a row that says so.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fusedformer.benchmarks import points, providers, timing, workers
from fusedformer.benchmarks.ops.attention import Case
from fusedformer.benchmarks.workers import Outcome, Workers

DOES_NOT_FIT, OVER_BUDGET = "does not fit", "over budget"

PASSES = 5

# A point's rounds in one pass: as many as fit in this time, from 1 to the number below.
_SLICE_SECONDS = 0.3
_SLICE_ROUNDS = 5
# A run longer than this needs no warm-up, and its memory run counts as one of its samples.
_LONG_SECONDS = 0.3
# A call may run past the budget by this much before it is ended.
_GRACE_SECONDS = 10.0
# Of the available memory, what a point may be predicted to take.
_MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Point:
    """A problem and the sweep it belongs to: "seq" or "head_dim"."""

    sweep: str
    case: Case


@dataclass
class _Seen:
    """What the last measured point of a series cost, from which the next one is predicted."""

    case: Case
    backend: str
    seconds: float
    peak_bytes: int | None


def gigabytes(count: float) -> str:
    """Bytes for a sentence, such as "1.5 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


@dataclass
class Sweep:
    """A run over points; its ``rows`` grow and sharpen while it runs.

    Args:
        impls: names from providers.IMPLS.
        pool: where measurements run.
        budget: seconds that the whole run may take.
        started: time.perf_counter() from which the budget counts.
    """

    impls: list[str]
    pool: Workers
    budget: float
    started: float = field(default_factory=time.perf_counter)
    rows: list[dict] = field(default_factory=list)
    _seen: dict[tuple[str, bool, float], _Seen] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.perf_counter() - self.started)

    def run(self, plan: list[Point], before: Callable[[int, Point], None]) -> Iterator[None]:
        """Measures; yields whenever rows have changed.

        Args:
            before: called with the number of the pass, from 1, and the point that is next.
        """
        held: list[tuple[Point, dict[str, dict]]] = []
        for point in plan:
            before(1, point)
            rows = self._first(point)
            held.append((point, rows))
            self.rows += rows.values()
            yield
        for number in range(2, PASSES + 1):
            for point, rows in held:
                going = {i: row for i, row in rows.items() if row["status"] == workers.OK}
                if going and sum(map(_seconds, going.values())) < self.left():
                    before(number, point)
                    self._time(point.case, going)
                    yield

    def _first(self, point: Point) -> dict[str, dict]:
        """Memory and first times of a point: its rows by implementation."""
        case = point.case
        asked = self._run(points.look, self.impls, case)
        if asked.status != workers.OK:
            return {impl: _row(point, impl, "unknown", asked) for impl in self.impls}
        backends, available = asked.value
        rows = {}
        for impl, backend in backends.items():
            refused = self._refusal(impl, backend, case, available)
            outcome = refused or self._run(points.peak_memory, impl, case)
            row = rows[impl] = _row(point, impl, backend, outcome)
            if outcome.status != workers.OK:
                continue
            row["memory"], cold = outcome.value
            if case.device == "cpu" and sum(cold.values()) > _LONG_SECONDS * 1e3:
                _add(row, {phase: [sample] for phase, sample in cold.items()})
                self._remember(impl, case, row)
        short = {
            impl: row
            for impl, row in rows.items()
            if row["status"] == workers.OK and "forward_ms" not in row
        }
        self._time(case, short)
        return rows

    def _time(self, case: Case, rows: dict[str, dict]) -> None:
        if not rows:
            return
        warmup = int(case.device == "cuda" or not all("forward_ms" in r for r in rows.values()))
        timed = self._run(points.times, list(rows), case, _SLICE_SECONDS, _SLICE_ROUNDS, warmup)
        for impl, row in rows.items():
            outcome = timed.value[impl] if timed.status == workers.OK else timed
            if outcome.status == workers.OK:
                _add(row, outcome.value)
                self._remember(impl, case, row)
            elif outcome.status != workers.TOO_SLOW or "forward_ms" not in row:
                row |= {"status": outcome.status, "reason": outcome.reason}

    def _run(self, function: Callable, *args: object) -> Outcome:
        # With the budget spent, what has to be looked at is still looked at: it measures nothing.
        return self.pool.run(function, *args, timeout=max(0.0, self.left()) + _GRACE_SECONDS)

    # --- Predictions ------------------------------------------------------------------------------

    def _remember(self, impl: str, case: Case, row: dict) -> None:
        peak = row["memory"]["training_bytes"]
        seen = _Seen(case, row["backend"], _seconds(row), peak)
        self._seen[impl, case.causal, case.dropout_p] = seen

    def _refusal(
        self, impl: str, backend: str, case: Case, available: "int | None"
    ) -> "Outcome | None":
        seen = self._seen.get((impl, case.causal, case.dropout_p))
        needed = float(providers.estimated_bytes(impl, backend, case))
        if self.left() <= 0:
            return Outcome(OVER_BUDGET, reason=f"the {self.budget:g} s were spent before")
        if seen is not None:
            growth = (case.seq / seen.case.seq) ** 2 * case.head_dim / seen.case.head_dim
            seconds = seen.seconds * growth
            # Each implementation may take its part of what is left, so that none starves another.
            if seconds > self.left() / len(self.impls):
                return Outcome(
                    OVER_BUDGET,
                    reason=f"would take about {seconds:.1f} s, more than its part of the "
                    f"{self.left():.1f} s that are left of {self.budget:g}",
                )
            if seen.peak_bytes and seen.backend == backend:
                needed *= seen.peak_bytes / providers.estimated_bytes(impl, backend, seen.case)
        if available is not None and needed > _MEMORY_SHARE * available:
            return Outcome(
                DOES_NOT_FIT,
                reason=f"needs about {gigabytes(needed)}; {gigabytes(available)} are available",
            )
        return None


def _row(point: Point, impl: str, backend: str, outcome: Outcome) -> dict:
    return {
        "sweep": point.sweep,
        "impl": impl,
        "backend": backend,
        "label": providers.label(impl, backend),
        **point.case.as_dict(),
        "status": outcome.status,
        "reason": outcome.reason,
    }


def _add(row: dict, samples: dict[str, list[float]]) -> None:
    for phase, added in samples.items():
        before = row[phase]["samples"] if phase in row else []
        row[phase] = timing.summary(before + added)


def _seconds(row: dict) -> float:
    """What one forward and backward take."""
    return (row["forward_ms"]["median"] + row["backward_ms"]["median"]) / 1e3
