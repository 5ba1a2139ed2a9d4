"""The tables of a bench run, as plain data for terminal, page and CSV."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence

from fusedformer.benchmarks import goals, metrics, workers
from fusedformer.benchmarks.entries import MEMORY, OVERHEAD, RATIO, WORKSPACE
from fusedformer.benchmarks.ops import common
from fusedformer.benchmarks.runner import NOT_HERE
from fusedformer.benchmarks.tables import Table, number


def speed(found: "dict[str, float] | None") -> str:
    """A ratio with its range."""
    if found is None:
        return "—"
    text = f"{times(found['median'])}x"
    if found["p20"] != found["p80"]:
        text += f" ({times(found['p20'])} to {times(found['p80'])})"
    return text


def times(value: float) -> str:
    """A ratio, without its "x"."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def cost(row: "dict | None") -> str:
    """What a row is about, or why it was not measured."""
    if row is None:
        return "—"
    if row["status"] != workers.OK:
        return row["status"]
    if row["quantity"] in (MEMORY, WORKSPACE):
        return f"{number(metrics.METRICS['memory'].value(row, None))} MiB"
    milliseconds = row["ms"]["median"]
    if row["quantity"] == OVERHEAD or milliseconds < 0.1:
        return f"{number(milliseconds * 1e3)} µs"
    return f"{number(milliseconds)} ms"


def entries(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """The rows by entry, then by implementation, both in order of appearance."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(row["key"], {})[row["impl"]] = row
    return found


def own(members: dict[str, dict]) -> list[dict]:
    """The rows of this project among those of an entry."""
    return [row for impl, row in members.items() if common.ours(impl)]


def reach(document: dict) -> list[Table]:
    """One line for each of ours in an entry: baseline and ours, their ratio, and the goals."""
    body = []
    for members in entries(document["rows"]).values():
        for i, ours in enumerate(own(members)):
            base = members.get(ours["baseline"])
            found = metrics.ratio(ours, base) if base is not ours else None
            forced = common.forced_backend(ours["impl"]) or ""
            line = [ours["title"], cost(base)] if i == 0 else ["", ""]
            line += [forced, cost(ours), speed(found)]
            for goal in ours["goals"] or [None]:
                body.append(line + (_goal(goal, ours, document) if goal else [""] * 4))
                line = [""] * 5
    if not body:
        return []
    head = ["", "baseline", "backend", "fused", "ratio", "or", "at least", "aim", "reached"]
    always = (0, 1, 3, 4)
    keep = [i for i in range(len(head)) if i in always or any(line[i] for line in body)]
    names = sorted({row["baseline"] for row in document["rows"]})
    return [
        Table(
            f"Against the baseline ({', '.join(names)}): cost of the baseline over ours",
            [head[i] for i in keep],
            [[line[i] for i in keep] for line in body],
            ("Ratios: median of the ratios of each round, with their 20/80 percentiles.",),
        )
    ]


def _goal(goal: dict, row: dict, document: dict) -> list[str]:
    kind = goal["kind"]
    return [
        "" if kind == RATIO else goals.text(kind, goals.value(kind, row, document)),
        goals.text(kind, goal["at_least"]),
        goals.text(kind, goal["aim"]),
        goals.reached(goal, row, document),
    ]


def details(document: dict, names: "Sequence[str]" = metrics.DEFAULT) -> list[Table]:
    """For each entry, every implementation with the metrics named; what did not run says why."""
    found = []
    for members in entries(document["rows"]).values():
        columns = [metrics.METRICS[name] for name in names]
        here = [row for row in members.values() if row["status"] != NOT_HERE]
        body = []
        for row in here:
            base = members.get(row["baseline"])
            cells = [column.text(column.value(row, base)) for column in columns]
            ran = row["label"] + (f" {row['version']}" if row["version"] else "")
            said = "" if row["status"] == workers.OK else f"{row['status']}: {row['reason']}"
            body.append([ran, *cells, said])
        used = [
            i
            for i in range(len(columns) + 2)
            if i == 0 or any(line[i] not in ("", "—") for line in body)
        ]
        head = ["ran", *(column.head for column in columns), ""]
        found.append(
            Table(
                _caption(next(iter(members.values()))),
                [head[i] for i in used],
                [[line[i] for i in used] for line in body],
                tuple(_absent(members.values())),
            )
        )
    return found


def _absent(rows: Iterable[dict]) -> Iterator[str]:
    """What took no part, by reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] == NOT_HERE:
            reasons.setdefault(row["reason"], []).append(row["impl"])
    for reason, names in reasons.items():
        yield f"Without {', '.join(names)}: {reason}."


def _caption(row: dict) -> str:
    shown = ", ".join(
        f"{name} {value}"
        for name, value in row["case"].items()
        if name != "device" and value not in (False, 0.0, 0)
    )
    return f"{row['title']} ({shown})"


_PLAIN = ("op", "mode", "quantity", "isa")


def csv_text(document: dict, names: "Sequence[str]" = metrics.DEFAULT) -> str:
    """The rows as CSV: problem, what ran, the metrics as plain numbers, status and reason."""
    rows = document["rows"]
    sizes = list(dict.fromkeys(name for row in rows for name in row["case"]))
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    writer.writerow([*_PLAIN, *sizes, "impl", "label", "version", *names, "status", "reason"])
    for row in rows:
        base = metrics.baseline_of(row, rows)
        values = [metrics.METRICS[name].value(row, base) for name in names]
        writer.writerow(
            [row[name] for name in _PLAIN]
            + [row["case"].get(name, "") for name in sizes]
            + [row["impl"], row["label"], row["version"], *values, row["status"], row["reason"]]
        )
    return held.getvalue()


def everything(document: dict, names: "Sequence[str]" = metrics.DEFAULT) -> list[Table]:
    """All tables, details first, so that the summary ends the output of a terminal."""
    return [*details(document, names), *reach(document)]
