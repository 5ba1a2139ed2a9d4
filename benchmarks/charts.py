"""The charts of a profile, drawn by matplotlib: one PNG of all panels, or an SVG for each.

Raises ImportError on import where matplotlib is absent.
"""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from fusedformer.benchmarks import results

# Told apart without colour by their markers, and legible on white and on black alike.
_STYLES = {
    "fused": ("#d55e00", "o"),
    "sdpa": ("#2f81d8", "s"),
    "plain": ("#0f9d74", "^"),
}
_INK = "#010203"  # stands for the page's own text colour; no other part of a chart has it
_GRID = "#8a8f98"

_FONT: Any = {  # matplotlib's stubs want a Literal for every key
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.titlesize": 12,
    "svg.fonttype": "none",
    "svg.hashsalt": "fusedformer",  # the same data gives the same file
}


@dataclass(frozen=True)
class Panel:
    """One set of axes: "time" or "memory" of one variant of one sweep."""

    sweep: str
    what: str
    causal: bool
    dropout_p: float

    @property
    def title(self) -> str:
        """Such as "Time: causal, dropout 0.1"."""
        return f"{self.what.capitalize()}: {results.variant_label(self.causal, self.dropout_p)}"


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


def draw(axes: Axes, panel: Panel, rows: list[dict], ink: str) -> None:
    """Draws one panel in the text colour ``ink``."""
    sweep = panel.sweep
    xs = sorted({row[sweep] for row in rows if row["sweep"] == sweep})
    for (impl, causal, dropout_p), members in results.series(rows, sweep).items():
        if (causal, dropout_p) != (panel.causal, panel.dropout_p):
            continue
        colour, marker = _STYLES[impl]
        for quantity, dashes in _LINES[panel.what].items():
            known = [(r[sweep], y) for r in members if (y := results.value(r, quantity))]
            if not known:
                continue
            name = results.series_label(members) if dashes == "-" else None
            axes.plot(
                *zip(*known, strict=True), dashes, color=colour, marker=marker, ms=5, lw=1.8,
                markerfacecolor=colour if dashes == "-" else "none", label=name,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(xs))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelrotation=45 if len(xs) > 6 else 0)
    axes.set_title(panel.title, color=ink)
    axes.set_xlabel("sequence length N" if sweep == "seq" else "head dimension d", color=ink)
    axes.set_ylabel(_UNITS[panel.what], color=ink)
    axes.tick_params(colors=ink, which="both")
    axes.grid(True, which="major", color=_GRID, alpha=0.3, lw=0.6)
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_color(_GRID)
        spine.set_visible(side in ("left", "bottom"))
    if axes.lines:
        axes.legend(
            fontsize=10, frameon=False, labelcolor=ink, loc="upper center",
            bbox_to_anchor=(0.5, -0.26),
        )  # fmt: skip


def png(rows: list[dict], heading: str, path: Path) -> None:
    """All panels on one white sheet, at most four in a row."""
    shown = panels(rows)
    columns = min(4, max(1, len(shown)))
    height = -(-len(shown) // columns)
    with matplotlib.rc_context(_FONT):
        figure = Figure(figsize=(4.8 * columns, 4.5 * height + 0.6), layout="constrained")
        figure.suptitle(heading, fontsize=13)
        grid = list(figure.subplots(height, columns, squeeze=False).flat)
        for axes, panel in zip(grid, shown, strict=False):
            draw(axes, panel, rows, "#1f2328")
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        figure.savefig(path, dpi=110)


def svg(panel: Panel, rows: list[dict]) -> str:
    """One panel as an <svg> element without a background, in the page's own text colour."""
    held = io.StringIO()
    with matplotlib.rc_context(_FONT):
        figure = Figure(figsize=(4.8, 4.6), layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure.subplots(), panel, rows, _INK)
        figure.savefig(held, format="svg", metadata={"Date": None, "Creator": None})
    text = held.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # The metadata names outside addresses, and ids repeat from one chart to the next.
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    mark = f"{panel.sweep}-{panel.what}-{panel.causal:d}-{panel.dropout_p:g}-".replace(".", "_")
    text = re.sub(r'\bid="', f'id="{mark}', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{mark}", text)
    # The page sets the width; the drawing's shape is in its viewBox.
    text = re.sub(r'(<svg [^>]*?)\s(?:height|width)="[^"]*pt"', r"\1", text, count=1)
    return re.sub(r'(<svg [^>]*?)\s(?:height|width)="[^"]*pt"', r"\1", text, count=1)
