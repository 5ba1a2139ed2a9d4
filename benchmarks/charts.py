"""What all charts share: matplotlib's settings, axes, colours, SVG without a background.

Raises ImportError on import where matplotlib is absent.
"""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

INK = "#010203"  # stands for the page's own text colour; no other part of a chart has it
GRID = "#8a8f98"
PAPER_INK = "#1f2328"

# Told apart without colour by their markers, and legible on white and on black alike.
_OURS, _THEIRS, _FORMULA = ("#d55e00", "o"), ("#2f81d8", "s"), ("#0f9d74", "^")
STYLES = {
    "fused": _OURS,
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
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelrotation=45 if len(xs) > 6 else 0)
    axes.set_xlabel(x_label, color=ink)
    axes.set_ylabel(y_label, color=ink)


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
        axes.legend(
            fontsize=10, frameon=False, labelcolor=ink, loc="upper center",
            bbox_to_anchor=(0.5, -0.26),
        )  # fmt: skip


def png(draws: Sequence[Draw], heading: str, path: Path) -> None:
    """All charts on one white sheet, at most four in a row."""
    columns = min(4, max(1, len(draws)))
    height = max(1, -(-len(draws) // columns))
    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=(4.8 * columns, 4.5 * height + 0.6), layout="constrained")
        figure.suptitle(heading, fontsize=13)
        grid = list(figure.subplots(height, columns, squeeze=False).flat)
        for axes, draw in zip(grid, draws, strict=False):
            draw(axes, PAPER_INK)
        for axes in grid[len(draws) :]:
            axes.set_visible(False)
        figure.savefig(path, dpi=110)


def svg(draw: Draw, mark: str, size: tuple[float, float] = (4.8, 4.6)) -> str:
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
