"""How far this project's rows are from their goals."""

from fusedformer.benchmarks import metrics
from fusedformer.benchmarks.entries import COPY, MICROSECONDS, OWN, RATIO, TFLOPS


def value(kind: str, row: dict, document: dict) -> "float | None":
    """What a goal of a row is about, or None where it was not measured.

    Args:
        kind: of the goal; see entries.Goal.
        row: of the implementation "fused".
        document: with "rows" and "ceilings".
    """
    rows = document["rows"]
    if kind == RATIO:
        found = metrics.ratio(row, metrics.baseline_of(row, rows))
        return found["median"] if found else None
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
    plain = row["case"] | {"dropout_p": 0.0}
    without = next(
        (
            r
            for r in rows
            if (r["op"], r["mode"], r["impl"], r["case"])
            == (row["op"], row["mode"], "fused", plain)
        ),
        None,
    )
    if without is None or "ms" not in without:
        return None
    return without["ms"]["median"] / row["ms"]["median"]


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
    return f"{amount:.0f}x" if amount >= 100 else f"{amount:.3g}x"


def reached(goal: dict, row: dict, document: dict) -> str:
    """Of a row's goal: "aim", "yes", "no" or "not measured"."""
    amount = value(goal["kind"], row, document)
    if amount is None:
        return "not measured"
    sign = -1 if goal["kind"] == MICROSECONDS else 1
    if goal["aim"] is not None and sign * amount >= sign * goal["aim"]:
        return "aim"
    return "yes" if sign * amount >= sign * goal["at_least"] else "no"
