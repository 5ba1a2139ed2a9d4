"""What all charts share: matplotlib's settings, axes, colours, SVG without a background.

Raises ImportError on import where matplotlib is absent.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

INK = "#010203"  # stands for the page's own text colour; no other part of a chart has it
GRID = "#8a8f98"
PAPER_INK = "#1f2328"

# Told apart without colour by their markers, and legible on white and on black alike.
_OURS, _THEIRS, _FORMULA = ("#d55e00", "o"), ("#2f81d8", "s"), ("#0f9d74", "^")
STYLES = {
    "fused": _OURS,
    "fused-triton": _OURS,
    "fused-cuda": ("#a01f2d", "*"),
    "sdpa": _THEIRS,
    "torch": _THEIRS,
    "plain": _FORMULA,
    "eager": _FORMULA,
    "no-cache": _FORMULA,
    "compile": ("#a064d8", "D"),
    "flex": ("#c49a00", "v"),
}
_OTHERS = (
    ("#17a2b8", "P"), ("#d6418c", "X"), ("#8c6d5a", "<"), ("#5a8f29", ">"), ("#7a7f87", "h"),
    ("#b3541e", "p"), ("#4f6bd8", "*"),
)  # fmt: skip

FONT: Any = {  # matplotlib's stubs want a Literal for every key
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.titlesize": 12,
    "svg.fonttype": "none",
    "svg.hashsalt": "fusedformer",  # the same data gives the same file
}

Draw = Callable[[Axes, str], None]  # draws one set of axes in a text colour
Size = tuple[float, float]  # inches

SIZE: Size = (4.8, 4.6)
_SHEET = 4 * SIZE[0]  # inches that charts side by side take at most

# From the axes down to the legend: room for tick labels, turned ones, and the label below them.
_LEGEND_INCHES = 0.62


def style(impl: str) -> tuple[str, str]:
    """The colour and the marker of an implementation, the same in every chart."""
    return STYLES.get(impl) or _OTHERS[sum(map(ord, impl)) % len(_OTHERS)]


def log_log(axes: Axes, xs: list, x_label: str, y_label: str, ink: str) -> None:
    """Logarithmic axes with a tick at each x."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(xs))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    decades(axes.yaxis, *axes.get_ylim())
    axes.tick_params(axis="x", labelrotation=45 if len(xs) > 6 else 0)
    axes.set_xlabel(x_label, color=ink)
    axes.set_ylabel(y_label, color=ink)


def decades(axis: Axis, low: float, high: float) -> None:
    """Ticks of a logarithmic axis: powers of ten; 1, 2 and 5 of each where there are few."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda y, _: _amount(y)))
    axis.set_minor_formatter(NullFormatter())


def _amount(y: float) -> str:
    if y < 1e-3:  # of a power of ten, where the axis spans many
        return f"10{str(round(math.log10(y))).translate(_RAISED)}" if y > 0 else "0"
    return f"{y:,.0f}" if y >= 1000 else f"{y:g}"


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def finish(axes: Axes, title: str, ink: str, legend: bool = True) -> None:
    """Title, colours, grid and a legend below the axes."""
    axes.set_title(title, color=ink)
    axes.tick_params(colors=ink, which="both")
    axes.grid(True, which="major", color=GRID, alpha=0.3, lw=0.6)
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_color(GRID)
        spine.set_visible(side in ("left", "bottom"))
    if legend and axes.get_legend_handles_labels()[0]:
        labels = axes.get_legend_handles_labels()[1]
        # In inches: in parts of the axes it would hang the lower the taller they are.
        figure = axes.get_figure(root=True)
        assert figure is not None
        inches = figure.dpi_scale_trans
        turned = 0.15 if any(t.get_rotation() for t in axes.get_xticklabels()) else 0.0
        axes.legend(
            fontsize=10, frameon=False, labelcolor=ink, loc="upper center",
            ncols=2 if len(labels) > 4 else 1, bbox_to_anchor=(0.5, 0.0), borderaxespad=0.0,
            bbox_transform=axes.transAxes
            + ScaledTranslation(0, -_LEGEND_INCHES - turned, inches),
        )  # fmt: skip


def png(drawn: Sequence[tuple[Draw, Size]], heading: str, path: Path) -> None:
    """All charts on one white sheet, in rows, each at its own size."""
    rows: list[list[tuple[Draw, Size]]] = [[]]
    for draw, size in drawn:
        if rows[-1] and sum(held[1][0] for held in rows[-1]) + size[0] > _SHEET:
            rows.append([])
        rows[-1].append((draw, size))
    widths = [sum(size[0] for _, size in row) for row in rows]
    heights = [max((size[1] for _, size in row), default=1.0) for row in rows]
    with matplotlib.rc_context(FONT):
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
        figure = Figure(figsize=(max(widths), sum(heights) + 0.6), layout=layout)
        figure.suptitle(heading, fontsize=13)
        parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, row, width in zip(parts, rows, widths, strict=True):
            # What a row leaves of the width, and a chart of the row's height, stays empty.
            columns = _split(part, [size[0] for _, size in row], max(widths) - width)
            for column, (draw, (_, height)) in zip(columns, row, strict=False):
                below = max(size[1] for _, size in row) - height
                draw(_split(column, [height], below, down=True)[0].subplots(), PAPER_INK)
        figure.savefig(path, dpi=110)


def _split(part: Any, sizes: list[float], rest: float, down: bool = False) -> list[Any]:
    """Parts of a figure side by side, or one below the other, and an empty one of size ``rest``."""
    ratios = sizes + ([rest] if rest > 0.1 else [])  # the layout cannot solve for nothing
    if down:
        return list(part.subfigures(len(ratios), 1, squeeze=False, height_ratios=ratios)[:, 0])
    return list(part.subfigures(1, len(ratios), squeeze=False, width_ratios=ratios)[0])


def svg(draw: Draw, mark: str, size: Size = SIZE) -> str:
    """One chart as an <svg> element without a background, in the page's own text colour.

    Args:
        mark: what its ids begin with; another for each chart of a page.
        size: inches, of which only the shape matters: the page sets the width.
    """
    held = io.StringIO()
    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure.subplots(), INK)
        figure.savefig(held, format="svg", metadata={"Date": None, "Creator": None})
    text = held.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # The metadata names outside addresses, and ids repeat from one chart to the next.
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{mark}', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{mark}", text)
    # The page sets the width; the drawing's shape is in its viewBox.
    text = re.sub(r'(<svg [^>]*?)\s(?:height|width)="[^"]*pt"', r"\1", text, count=1)
    return re.sub(r'(<svg [^>]*?)\s(?:height|width)="[^"]*pt"', r"\1", text, count=1)
