"""Walks a sweep from its shortest point to its longest within a time budget.

Each point is one attention problem measured for every implementation: the peak memory of each in
a process of its own, then all their times interleaved in one more. What would not fit in memory,
or in the time left, is a row that says so.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from fusedformer.benchmarks import points, providers, workers
from fusedformer.benchmarks.providers import Case
from fusedformer.benchmarks.workers import Outcome, Workers

DOES_NOT_FIT, OVER_BUDGET = "does not fit", "over budget"

# A call shorter than this is also run once at full size before it is timed.
_WARM_SECONDS = 0.3
# More time than this at one point would not change its median.
_POINT_SECONDS = 4.0
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
    """A run over points.

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
    _seen: dict[tuple[str, bool, float], _Seen] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.perf_counter() - self.started)

    def run(self, plan: list[Point], before: Callable[[Point], None]) -> Iterator[list[dict]]:
        """Measures each point in turn; yields its rows, one an implementation.

        Args:
            before: called with each point before it is measured.
        """
        for index, point in enumerate(plan):
            before(point)
            yield self._measure(point, plan[index:])

    def _measure(self, point: Point, todo: list[Point]) -> list[dict]:
        asked = self.pool.run(points.look, self.impls, point.case)
        if asked.status != workers.OK:
            return [self._row(point, impl, "unknown", asked) for impl in self.impls]
        backends, available = asked.value
        rows = {}
        for impl in self.impls:
            refused = self._refusal(impl, backends[impl], point.case, available)
            outcome = refused or self.pool.run(points.peak_memory, impl, point.case)
            rows[impl] = self._row(point, impl, backends[impl], outcome)
            if outcome.status == workers.OK:
                rows[impl]["memory"] = outcome.value
                self._remember(impl, rows[impl], outcome.value["seconds"], outcome.value)
        self._time(point, todo, {i: row for i, row in rows.items() if row["status"] == workers.OK})
        return list(rows.values())

    def _time(self, point: Point, todo: list[Point], rows: dict[str, dict]) -> None:
        if not rows:
            return
        cold = max(row["memory"]["seconds"] for row in rows.values())
        warmup = int(point.case.device == "cuda" or cold < _WARM_SECONDS)
        seconds = self._allotment(point, todo)
        timed = self.pool.run(points.times, list(rows), point.case, seconds, warmup)
        for impl, row in rows.items():
            outcome = timed.value[impl] if timed.status == workers.OK else timed
            if outcome.status != workers.OK:
                row |= {"status": outcome.status, "reason": outcome.reason}
                continue
            row |= outcome.value | {"warmup": warmup}
            medians = outcome.value["forward_ms"]["median"] + outcome.value["backward_ms"]["median"]
            self._remember(impl, row, medians / 1e3, row["memory"])

    def _row(self, point: Point, impl: str, backend: str, outcome: Outcome) -> dict:
        return {
            "sweep": point.sweep,
            "impl": impl,
            "backend": backend,
            "label": providers.label(impl, backend),
            **point.case.as_dict(),
            "status": outcome.status,
            "reason": outcome.reason,
        }

    # --- Predictions ------------------------------------------------------------------------------

    def _remember(self, impl: str, row: dict, seconds: float, used: dict) -> None:
        case = Case(**{name: row[name] for name in Case.__dataclass_fields__})
        self._seen[impl, case.causal, case.dropout_p] = _Seen(
            case, row["backend"], seconds, used["training_bytes"]
        )

    def _predicted_seconds(self, impl: str, case: Case) -> "float | None":
        seen = self._seen.get((impl, case.causal, case.dropout_p))
        if seen is None:
            return None
        growth = (case.seq / seen.case.seq) ** 2 * case.head_dim / seen.case.head_dim
        return seen.seconds * growth

    def _refusal(
        self, impl: str, backend: str, case: Case, available: "int | None"
    ) -> "Outcome | None":
        seconds = self._predicted_seconds(impl, case)
        if seconds is not None and 2 * seconds > self.left():  # once for memory, once for time
            return Outcome(
                OVER_BUDGET,
                reason=f"two runs would take about {2 * seconds:.1f} s; "
                f"{max(0.0, self.left()):.1f} s of the budget of {self.budget:g} s are left",
            )
        needed = float(providers.estimated_bytes(impl, backend, case))
        seen = self._seen.get((impl, case.causal, case.dropout_p))
        if seen is not None and seen.peak_bytes and seen.backend == backend:
            needed *= seen.peak_bytes / providers.estimated_bytes(impl, backend, seen.case)
        if available is not None and needed > _MEMORY_SHARE * available:
            return Outcome(
                DOES_NOT_FIT,
                reason=f"needs about {gigabytes(needed)}; {gigabytes(available)} are available",
            )
        return None

    def _allotment(self, point: Point, todo: Iterable[Point]) -> float:
        """Seconds for the timing of a point: its part of what is left, by predicted cost."""

        def cost(case: Case) -> float:
            return sum(self._predicted_seconds(impl, case) or 0.0 for impl in self.impls)

        own, rest = cost(point.case), sum(cost(other.case) for other in todo)
        # Each point still to come also runs once for its memory.
        spare = self.left() / (2 * rest) if rest > 0 else 1.0
        return min(_POINT_SECONDS, own * max(0.0, 2 * spare - 1))


def summarised(row: dict) -> bool:
    """Whether a row has times."""
    return row["status"] == workers.OK and "forward_ms" in row
