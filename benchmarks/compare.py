"""``fusedformer bench compare A.json B.json``: what changed from one run to another.

The ratio of two medians has a range by the bootstrap (Efron 1979): the samples of each run are
drawn anew, with replacement, and the middle 95% of the ratios of their medians is the range. Runs
of the same machine only are comparable, and even there a busy phase moves all ratios alike.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fusedformer.benchmarks import document, metrics, terminal, timing, workers
from fusedformer.benchmarks.entries import MEMORY, WORKSPACE
from fusedformer.benchmarks.options import names_with_commas
from fusedformer.benchmarks.tables import Table

_DRAWS = 2000
_LOW, _HIGH = 0.025, 0.975

SLOWER, FASTER, SAME = "slower", "faster", "same"


@dataclass(frozen=True)
class Change:
    """One row in both runs: B's cost over A's, with its range, and what that means."""

    title: str
    label: str
    ratio: float
    low: float
    high: float
    verdict: str


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("before", metavar="A.json", help="the run that is compared with")
    parser.add_argument("after", metavar="B.json", help="the run that is judged")
    parser.add_argument(
        "--threshold", default="5", metavar="PERCENT", help="changes below it do not count (5)"
    )
    parser.add_argument(
        "--only", default="fused", metavar="IMPL,...", help="these implementations (fused)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the changes; the exit code is 1 where something is slower beyond the threshold.

    Raises:
        ValueError: a file is no bench result, or an option is wrong.
    """
    try:
        threshold = float(args.threshold) / 100
    except ValueError:
        threshold = -1.0
    if not 0 <= threshold < 10:
        raise ValueError(f"--threshold got {args.threshold!r}; it wants percent, from 0 up")
    before, after = (document.read(Path(name)) for name in (args.before, args.after))
    for data, name in ((before, args.before), (after, args.after)):
        if "rows" not in data or data["kind"] not in ("bench", "gpu"):
            raise ValueError(f"{name} holds a {data['kind']!r} result; wanted is 'bench' or 'gpu'")
    only = names_with_commas(args.only)
    found = list(changes(before["rows"], after["rows"], threshold, only))
    if not found:
        raise ValueError(f"{args.before} and {args.after} have no row of {args.only} in common")
    terminal.show([table(found, threshold)])
    for name in ("device_name", "torch", "threads"):
        was, now = before["environment"].get(name), after["environment"].get(name)
        if was != now:
            print(f"Not comparable: {name} is {was!r} and {now!r}.")
    return int(any(change.verdict == SLOWER for change in found))


def changes(
    before: list[dict], after: list[dict], threshold: float, only: "tuple[str, ...]"
) -> Iterator[Change]:
    """The rows that both runs measured.

    A change counts where its whole range is beyond the threshold.
    """
    draws = random.Random(0)
    known = {(row["key"], row["impl"]): row for row in before if row["status"] == workers.OK}
    for row in after:
        was = known.get((row["key"], row["impl"]))
        if was is None or row["impl"] not in only:
            continue
        if row["status"] != workers.OK:
            label = f"{row['label']}: {row['status']}"
            yield Change(row["title"], label, 1.0, 1.0, 1.0, SLOWER)
            continue
        if row["quantity"] in (MEMORY, WORKSPACE):
            ours, theirs = metrics.memory(row), metrics.memory(was)
            if ours is None or theirs is None:
                continue
            ratio = low = high = max(ours, 1) / max(theirs, 1)
        else:
            ratio, low, high = bootstrap(was["ms"]["samples"], row["ms"]["samples"], draws)
        verdict = SAME
        if low > 1 + threshold:
            verdict = SLOWER
        elif high < 1 / (1 + threshold):
            verdict = FASTER
        yield Change(row["title"], row["label"], ratio, low, high, verdict)


def bootstrap(
    before: list[float], after: list[float], draws: random.Random
) -> tuple[float, float, float]:
    """The ratio of the medians, after over before, and its 95% range."""

    def median(samples: list[float]) -> float:
        return timing.quantile(samples, 0.5)

    ratios = [
        median(draws.choices(after, k=len(after))) / median(draws.choices(before, k=len(before)))
        for _ in range(_DRAWS)
    ]
    low, high = (timing.quantile(ratios, q) for q in (_LOW, _HIGH))
    return median(after) / median(before), low, high


def table(found: list[Change], threshold: float) -> Table:
    """The changes, those that count first."""
    order = {SLOWER: 0, FASTER: 1, SAME: 2}
    body = [
        [
            change.title,
            change.label,
            f"{change.ratio:.3f}",
            f"{change.low:.3f} to {change.high:.3f}",
            change.verdict,
        ]
        for change in sorted(found, key=lambda change: order[change.verdict])
    ]
    counts = ", ".join(
        f"{sum(change.verdict == verdict for change in found)} {verdict}" for verdict in order
    )
    return Table(
        f"B over A: {counts}",
        ["", "ran", "cost", "95% range", ""],
        body,
        (f"A change counts where its whole range is beyond {threshold:.0%}.",),
    )
