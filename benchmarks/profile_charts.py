"""The charts of an attention profile: time and memory of each variant, over length and dimension,
with the fitted exponents; a roofline.

Raises ImportError on import where matplotlib is absent.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from fusedformer.benchmarks import bench_charts, charts, results, workers
from fusedformer.benchmarks.sweep import DOES_NOT_FIT


@dataclass(frozen=True)
class Panel:
    """One set of axes: "time" or "memory" of one variant of one sweep."""

    sweep: str
    what: str
    causal: bool
    dropout_p: float

    @property
    def title(self) -> str:
        """Such as "Time: causal, dropout 0.1", or "Time over d: full, no dropout"."""
        what = self.what.capitalize() + (" over d" if self.sweep == "head_dim" else "")
        return f"{what}: {results.variant_label(self.causal, self.dropout_p)}"


def panels(rows: list[dict]) -> list[Panel]:
    """The panels that a document's rows fill: times first, then memory, sweep by sweep."""
    return [
        Panel(sweep, what, causal, dropout_p)
        for sweep in ("seq", "head_dim")
        for what in ("time", "memory")
        for causal, dropout_p in results.variants(rows, sweep)
    ]


# What a panel draws: quantity -> line style.
_LINES = {
    "time": {"forward_ms": "-", "backward_ms": "--"},
    "memory": {"training_bytes": "-"},
}

_UNITS = {
    "time": "milliseconds (dashed: backward)",
    "memory": "peak MiB, beyond the inputs",
}


def draw(axes: Axes, ink: str, panel: Panel, document: dict) -> None:
    """Draws one panel in the text colour ``ink``."""
    sweep, rows = panel.sweep, document["rows"]
    xs = sorted({row[sweep] for row in rows if row["sweep"] == sweep})
    for (impl, causal, dropout_p), members in results.series(rows, sweep).items():
        if (causal, dropout_p) != (panel.causal, panel.dropout_p):
            continue
        colour, marker = charts.style(impl)
        for quantity, dashes in _LINES[panel.what].items():
            known = [(r[sweep], y) for r in members if (y := results.value(r, quantity))]
            if not known:
                continue
            name = results.series_label(members) if dashes == "-" else None
            law = _law(document, sweep, (impl, causal, dropout_p), quantity)
            if name and law:  # a zero has no sign: + 0.0 takes it away
                x = "N" if sweep == "seq" else "d"
                name += f": {x}^{round(law['exponent'], 2) + 0.0:.2f}"
            axes.plot(
                *zip(*known, strict=True), dashes, color=colour, marker=marker, ms=5, lw=1.8,
                markerfacecolor=colour if dashes == "-" else "none", label=name,
            )  # fmt: skip
    if panel.what == "memory":
        _draw_limit(axes, ink, panel, document)
    x_label = "sequence length N" if sweep == "seq" else "head dimension d"
    charts.log_log(axes, xs, x_label, _UNITS[panel.what], ink)
    charts.finish(axes, panel.title, ink)


def _law(document: dict, sweep: str, series: results.Series, quantity: str) -> "dict | None":
    """What was fitted to a quantity of a series, or None."""
    for law in document["fits"]:
        about = law["sweep"], law["quantity"], (law["impl"], law["causal"], law["dropout_p"])
        if about == (sweep, quantity, series) and law["fitted"]:
            return law
    return None


def roofline(document: dict) -> "charts.Draw | None":
    """Forwards without dropout below the ceilings that were measured in the run; None without."""
    rows = []
    for row in document["rows"]:
        if row["sweep"] == "seq" and not row["dropout_p"] and "forward_ms" in row:
            operations, moved = results.forward_work(row)
            measured = {"flops": operations, "bytes": moved, "ms": row["forward_ms"]}
            rows.append(measured | {"impl": row["impl"], "case": {"dtype": row["dtype"]}})
    ceilings = document["ceilings"]
    if not rows or not ceilings:
        return None
    return functools.partial(bench_charts.draw_roofline, rows=rows, ceilings=ceilings)


def _draw_limit(axes: Axes, ink: str, panel: Panel, document: dict) -> None:
    """A line at the memory that there was, and on it a cross where a problem did not fit."""
    available = document.get("available_bytes")
    over = [
        row
        for row in document["rows"]
        if (row["sweep"], row["causal"], row["dropout_p"])
        == (panel.sweep, panel.causal, panel.dropout_p)
        and row["status"] in (DOES_NOT_FIT, workers.OUT_OF_MEMORY)
    ]
    if available is None or not over:
        return
    level = available / 2**20
    axes.axhline(level, color=ink, lw=1.0, ls=":", label="memory that there was")
    for row in over:
        colour, _ = charts.style(row["impl"])
        axes.plot(row[panel.sweep], level, "x", color=colour, ms=9, mew=2.2)


def png(document: dict, heading: str, path: Path) -> None:
    """All panels on one white sheet."""
    drawn: list[tuple[charts.Draw, charts.Size]] = [
        (functools.partial(draw, panel=panel, document=document), charts.SIZE)
        for panel in panels(document["rows"])
    ]
    if roof := roofline(document):
        drawn.append((roof, charts.SIZE))
    charts.png(drawn, heading, path)


def svg(panel: Panel, document: dict) -> str:
    """One panel as an <svg> element."""
    mark = f"{panel.sweep}-{panel.what}-{panel.causal:d}-{panel.dropout_p:g}-".replace(".", "_")
    return charts.svg(functools.partial(draw, panel=panel, document=document), mark)
