"""What a profile's document holds beside its rows: series, fits, what a text costs."""

from collections.abc import Iterator
from pathlib import Path

from fusedformer.benchmarks import fit, memory, workers
from fusedformer.benchmarks.document import Document
from fusedformer.benchmarks.ops import attention

# What is fitted: key -> (title, factor to the table's unit, floor in that unit, unit)
QUANTITIES = {
    "forward_ms": ("forward time", 1.0, 1.0, "ms"),
    "backward_ms": ("backward time", 1.0, 1.0, "ms"),
    "forward_bytes": ("forward memory", 2.0**-20, 1.0, "MiB"),
    "training_bytes": ("peak memory", 2.0**-20, 1.0, "MiB"),
}

Series = tuple[str, bool, float]  # implementation, causal, dropout_p


def value(row: dict, quantity: str) -> "float | None":
    """A row's number in the table's unit (ms or MiB), or None where it was not measured."""
    scale = QUANTITIES[quantity][1]
    if quantity.endswith("_ms"):
        return row[quantity]["median"] * scale if quantity in row else None
    held = row.get("memory", {}).get(quantity)
    return None if held is None else held * scale


def forward_work(row: dict) -> tuple[float, float]:
    """Operations of a row's forward, and the bytes that it needs to move."""
    case = attention.Case(**{name: row[name] for name in attention.Case.__dataclass_fields__})
    return attention.flops(case, "fwd"), attention.moved(case, "fwd")


def series(rows: list[dict], sweep: str) -> "dict[Series, list[dict]]":
    """The rows of a sweep by series, each in order of its x."""
    found: dict[Series, list[dict]] = {}
    for row in sorted((r for r in rows if r["sweep"] == sweep), key=lambda r: r[sweep]):
        found.setdefault((row["impl"], row["causal"], row["dropout_p"]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: item[0][1:]))


def series_label(rows: list[dict]) -> str:
    """The names of what ran in a series, as its rows have them."""
    ran = [row["label"] for row in rows if row["status"] == workers.OK]
    return " / ".join(dict.fromkeys(ran or [row["label"] for row in rows]))


def variant_label(causal: bool, dropout_p: float) -> str:
    """Such as "causal, dropout 0.1"."""
    return f"{'causal' if causal else 'full'}, " + (
        f"dropout {dropout_p:g}" if dropout_p else "no dropout"
    )


def fits(rows: list[dict]) -> list[dict]:
    """The fitted exponent, or the reason for none, of every quantity of every series."""
    found = []
    for sweep in ("seq", "head_dim"):
        for (impl, causal, dropout_p), members in series(rows, sweep).items():
            for quantity, (_, _, floor, unit) in QUANTITIES.items():
                points = [
                    (row[sweep], measured)
                    for row in members
                    if (measured := value(row, quantity)) is not None and measured > 0
                ]
                law = fit.fit_series(points, floor, f"{floor:g} {unit}")
                about = {
                    "sweep": sweep,
                    "impl": impl,
                    "label": series_label(members),
                    "causal": causal,
                    "dropout_p": dropout_p,
                    "quantity": quantity,
                }
                found.append(about | law)
    return found


def crossings(rows: list[dict]) -> list[dict]:
    """Where this project's attention overtakes each other implementation, over length.

    Of forward with backward in time, and of peak memory; see fit.crossing().
    """
    found = []
    members = series(rows, "seq")
    for (impl, causal, dropout_p), ours in members.items():
        if impl != "fused":
            continue
        for other, theirs in members.items():
            if other[0] == "fused" or other[1:] != (causal, dropout_p):
                continue
            for quantity in ("time", "memory"):
                points = [
                    [(row["seq"], held) for row in rows_of if (held := _whole(row, quantity))]
                    for rows_of in (ours, theirs)
                ]
                found.append(
                    {
                        "impl": other[0],
                        "label": series_label(theirs),
                        "causal": causal,
                        "dropout_p": dropout_p,
                        "quantity": quantity,
                        **fit.crossing(*points),
                    }
                )
    return found


def _whole(row: dict, quantity: str) -> "float | None":
    if quantity == "memory":
        return value(row, "training_bytes")
    parts = value(row, "forward_ms"), value(row, "backward_ms")
    return None if None in parts else sum(part for part in parts if part is not None)


def longest_bins(bins: list[dict]) -> list[dict]:
    """The longest bins that together hold at most a tenth of the paragraphs; at least one."""
    most = sum(part["count"] for part in bins) / 10
    start = len(bins) - 1
    while start > 0 and sum(part["count"] for part in bins[start - 1 :]) <= most:
        start -= 1
    return bins[start:]


def text_totals(rows: list[dict], bins: list[dict]) -> list[dict]:
    """What a whole text costs each series: its bins' counts times the time at their length.

    ``seconds`` is forward and backward over all paragraphs, one at a time; ``longest_share`` the
    part of it spent in longest_bins(); both None when a bin was not measured.
    """
    found = []
    tail = longest_bins(bins)
    for (impl, causal, dropout_p), members in series(rows, "seq").items():
        spent = {}
        for row in members:
            if "forward_ms" in row:
                spent[row["seq"]] = row["forward_ms"]["median"] + row["backward_ms"]["median"]
        missing = [part["length"] for part in bins if part["length"] not in spent]
        costs = [part["count"] * spent.get(part["length"], 0.0) for part in bins]
        found.append(
            {
                "impl": impl,
                "label": series_label(members),
                "causal": causal,
                "dropout_p": dropout_p,
                "seconds": None if missing else sum(costs) / 1e3,
                "longest_share": None if missing else sum(costs[-len(tail) :]) / sum(costs),
                "not_measured": missing,
            }
        )
    return found


def new_document(path: Path, options: dict, environment: dict, text: "dict | None") -> Document:
    """The document of a profile that begins; ``text`` is that of TextLengths.as_dict(), or None."""
    return Document(
        path,
        "profile attention",
        options,
        environment,
        memory_method=memory.METHODS[environment["device"]],
        text=text,
        errors=[],
        rows=[],
        fits=[],
        crossings=[],
        ceilings=None,
        available_bytes=None,
        text_totals=[],
        left_out=[],
    )


def finish(document: Document, state: str) -> None:
    """Computes what follows from the rows, and saves."""
    data = document.data
    data["fits"] = fits(data["rows"])
    data["crossings"] = crossings(data["rows"])
    if data["text"]:
        data["text_totals"] = text_totals(data["rows"], data["text"]["bins"])
    document.finish(state)


def variants(rows: list[dict], sweep: str) -> Iterator[tuple[bool, float]]:
    """The (causal, dropout_p) pairs of a sweep, in the order in which they are shown."""
    seen = {(row["causal"], row["dropout_p"]) for row in rows if row["sweep"] == sweep}
    yield from sorted(seen)
