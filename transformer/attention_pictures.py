"""What a model looks at, as PNG files, drawn by matplotlib.

Raises ImportError on import where matplotlib is absent.
"""

import warnings
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure
from torch import Tensor

from fusedformer.transformer.look import Attention, Look, Prediction

_HEADS_IN_A_ROW = 4
_STEPS = 24  # of a text whose predictions are drawn; the page has all

# Fonts with signs that matplotlib's own has not, in the order in which they are tried.
_WIDE_FONTS = (
    "Noto Sans CJK KR", "Noto Sans CJK JP", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo",
    "AppleGothic", "Microsoft YaHei", "Hiragino Sans", "Noto Sans", "Arial Unicode MS",
)  # fmt: skip


def _style() -> Any:  # matplotlib's stubs want a Literal for every key
    installed = {font.name for font in font_manager.fontManager.ttflist}
    families = ["DejaVu Sans", *(font for font in _WIDE_FONTS if font in installed)]
    # A word may hold a dollar sign, which is no formula.
    return {"font.family": families, "font.size": 9, "text.parse_math": False}


def write_pictures(look: Look, folder: Path) -> tuple[list[Path], bool]:
    """A picture for each layer of each attention, one of the positions, one of the predictions.

    Returns:
        the files, and whether some words have signs that no installed font has.
    """
    written = []
    with matplotlib.rc_context(_style()), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for one in look.attentions:
            for layer, weights in enumerate(one.weights, start=1):
                path = folder / f"attention-{one.name}-layer{layer}.png"
                _save(_attention(one, layer, weights), path)
                written.append(path)
        written.append(folder / "positions.png")
        _save(_positions(look.positions, look.positions_about), written[-1])
        if look.predictions:
            written.append(folder / "predictions.png")
            _save(_predictions(look.predictions[:_STEPS]), written[-1])
    lacking = [one for one in caught if "missing from font" in str(one.message)]
    for other in caught:
        if other not in lacking:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return written, bool(lacking)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)


def _cut(word: str) -> str:
    return word if len(word) <= 12 else word[:11] + "…"


def _attention(one: Attention, layer: int, weights: Tensor) -> Figure:
    """weights: (heads, queries, keys)."""
    heads, queries, keys = weights.shape
    columns = min(_HEADS_IN_A_ROW, heads)
    rows = -(-heads // columns)
    size = [0.9 + max(2.2, 0.17 * count) for count in (keys, queries)]
    figure = Figure(
        figsize=(columns * size[0] + 0.6, rows * (size[1] + 0.5) + 0.6), layout="constrained"
    )
    figure.suptitle(f"{one.title}, layer {layer}", fontsize=12)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for head, axes in enumerate(panels):
        if head >= heads:
            axes.set_visible(False)
            continue
        drawn = axes.imshow(weights[head].tolist(), cmap="Oranges", vmin=0, vmax=1)
        axes.set_title(f"head {head + 1}", fontsize=9)
        axes.set_xticks(range(keys), [_cut(word) for word in one.keys], rotation=90, fontsize=7)
        axes.set_yticks(range(queries), [_cut(word) for word in one.queries], fontsize=7)
        axes.tick_params(length=0)
    figure.colorbar(drawn, ax=figure.axes[:heads], label="attention weight", shrink=0.6, pad=0.01)
    return figure


def _positions(positions: Tensor, about: str) -> Figure:
    """positions: (positions, dimensions)."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    largest = float(positions.abs().max()) or 1.0
    drawn = axes.imshow(
        positions.tolist(), cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    axes.set_title(about, fontsize=10)
    axes.set_xlabel("dimension")
    axes.set_ylabel("position")
    figure.colorbar(drawn, ax=axes, pad=0.01)
    return figure


def _predictions(predictions: list[Prediction]) -> Figure:
    """For each step the target beside the likeliest words, untrained and trained."""
    figure = Figure(figsize=(9, 1.25 * len(predictions) + 0.4), layout="constrained")
    panels = figure.subplots(len(predictions), 2, squeeze=False, sharex=True)
    for one, (left, right) in zip(predictions, panels, strict=True):
        for axes, likeliest in ((left, one.before), (right, one.after)):
            colours = ["#b54a00" if word == one.target else "#8a8f98" for word, _ in likeliest]
            places = range(len(likeliest))
            axes.barh(places, [prob for _, prob in likeliest], color=colours, height=0.75)
            axes.set_yticks(places, [_cut(word) for word, _ in likeliest], fontsize=7)
            axes.invert_yaxis()
            axes.set_xlim(0, 1)
            axes.tick_params(length=0, labelsize=7)
            for side in ("top", "right", "bottom"):
                axes.spines[side].set_visible(False)
        for axes, title in ((left, "untrained"), (right, "trained")):
            axes.set_title(f"{_cut(one.read)} → {_cut(one.target)}", fontsize=9, loc="left")
            axes.set_title(title, fontsize=8, loc="right", color="#8a8f98")
        for axes, prob in ((left, one.target_before), (right, one.target_after)):
            axes.text(0.99, 0.5, f"target: {prob:.1%}", ha="right", va="center", fontsize=8,
                      color="#b54a00", transform=axes.transAxes)  # fmt: skip
    return figure
