"""How far this project's rows are from their goals."""

from fusedformer.benchmarks import metrics
from fusedformer.benchmarks.entries import (
    AT_MOST,
    BEST,
    COPY,
    LINEAR,
    MICROSECONDS,
    OWN,
    RATIO,
    TFLOPS,
)


def value(kind: str, row: dict, document: dict) -> "float | None":
    """What a goal of a row is about, or None where it was not measured.

    Args:
        kind: of the goal; see entries.Goal.
        row: of an implementation of this project.
        document: with "rows" and "ceilings".
    """
    rows = document["rows"]
    if kind == RATIO:
        return _ratio(row, metrics.baseline_of(row, rows))
    if kind == BEST:
        theirs = [r for r in rows if r["key"] == row["key"] and r["impl"].startswith("sdpa")]
        found = [ratio for other in theirs if (ratio := _ratio(row, other)) is not None]
        return min(found, default=None)
    if kind == LINEAR:
        half = _like(row, rows, seq=row["case"]["seq"] // 2)
        ours, before = metrics.memory(row), half and metrics.memory(half)
        return ours / before if ours and before else None
    if "ms" not in row:
        return None
    if kind == TFLOPS:
        return metrics.METRICS["tflops"].value(row, None)
    if kind == MICROSECONDS:
        return row["ms"]["median"] * 1e3
    if kind == COPY:
        rate, ceiling = metrics.METRICS["gbps"].value(row, None), document.get("ceilings")
        return rate / ceiling["copy_gbps"] if rate and ceiling else None
    assert kind == OWN
    without = _like(row, rows, dropout_p=0.0)
    if without is None or "ms" not in without:
        return None
    return without["ms"]["median"] / row["ms"]["median"]


def _ratio(row: dict, base: "dict | None") -> "float | None":
    found = metrics.ratio(row, base)
    return found["median"] if found else None


def _like(row: dict, rows: list[dict], **changes: object) -> "dict | None":
    """The row of the same implementation at a problem that differs so."""
    names = ("op", "mode", "quantity", "impl")
    case = row["case"] | changes
    return next(
        (r for r in rows if r["case"] == case and all(r[name] == row[name] for name in names)),
        None,
    )


def text(kind: str, amount: "float | None") -> str:
    """A value or a goal as tables write it."""
    if amount is None:
        return ""
    if kind == TFLOPS:
        return f"{amount:.0f} TFLOP/s"
    if kind == MICROSECONDS:
        return f"{amount:.3g} µs"
    if kind == COPY:
        return f"{amount:.0%} of copy"
    if kind == OWN:
        return f"{amount:.0%} of p = 0"
    if kind == LINEAR:
        return f"{amount:.2f}x half the length"
    times = f"{amount:.0f}x" if amount >= 100 else f"{amount:.3g}x"
    return f"{times} torch's best" if kind == BEST else times


def reached(goal: dict, row: dict, document: dict) -> str:
    """Of a row's goal: "aim", "yes", "no" or "not measured"."""
    amount = value(goal["kind"], row, document)
    if amount is None:
        return "not measured"
    sign = -1 if goal["kind"] in AT_MOST else 1
    if goal["aim"] is not None and sign * amount >= sign * goal["aim"]:
        return "aim"
    if goal["at_least"] is None:
        return "not the aim"
    return "yes" if sign * amount >= sign * goal["at_least"] else "no"
