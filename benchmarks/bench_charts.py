"""The charts of a bench run: speed-ups as bars, cost over size with fitted slopes, a roofline.

Raises ImportError on import where matplotlib is absent.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes

from fusedformer.benchmarks import bench_tables, charts, fit, metrics, workers
from fusedformer.benchmarks.entries import MEMORY, MODE_NAMES, TIME, WORKSPACE
from fusedformer.benchmarks.ops.registry import OPS

# A slope is fitted where there are so many sizes; fewer would give a line, not a law.
_FITTED_POINTS = 4
_LEAST_POINTS = 3  # of a line


@dataclass(frozen=True)
class Chart:
    """One chart: what it shows, how it is drawn, and its shape in inches."""

    title: str
    draw: charts.Draw
    size: charts.Size = charts.SIZE


# --- Speed-ups ------------------------------------------------------------------------------------

_ENTRIES = 8  # on one chart


def speedups(document: dict) -> Iterator[Chart]:
    """For each op, the baseline's cost in units of each implementation's."""
    by_op: dict[str, list[dict[str, dict]]] = {}
    for members in bench_tables.entries(document["rows"]).values():
        first = next(iter(members.values()))
        by_op.setdefault(first["op"], []).append(members)
    for op, groups in by_op.items():
        for start in range(0, len(groups), _ENTRIES):
            chosen = groups[start : start + _ENTRIES]
            if bars := [bar for members in chosen for bar in _bars(members)]:
                title = f"{op}: the baseline's cost over that of each"
                draw = functools.partial(_draw_bars, bars=bars, title=title)
                yield Chart(title, draw, (7.2, 1.2 + 0.24 * len(bars)))


@dataclass(frozen=True)
class Bar:
    """One implementation of an entry; ``value`` None is an empty line with the entry's title."""

    label: str
    impl: str = ""
    value: float | None = None
    low: float = 0.0
    high: float = 0.0


def _bars(members: dict[str, dict]) -> list[Bar]:
    found = []
    for impl, row in members.items():
        if impl == row["baseline"]:
            continue
        ratio = metrics.ratio(row, members.get(row["baseline"]))
        if ratio:
            found.append(Bar(row["label"], impl, ratio["median"], ratio["p20"], ratio["p80"]))
    title = next(iter(members.values()))["title"].partition(", ")[2]
    return [Bar(title), *found] if found else []


def _draw_bars(axes: Axes, ink: str, bars: list[Bar], title: str) -> None:
    places = range(len(bars), 0, -1)
    for place, bar in zip(places, bars, strict=True):
        if bar.value is None:
            axes.text(
                0.01, place - 0.12, bar.label, color=ink, fontsize=9, fontweight="bold",
                transform=axes.get_yaxis_transform(), va="center",
            )  # fmt: skip
            continue
        colour, _ = charts.style(bar.impl)
        axes.barh(place, bar.value, color=colour, height=0.72)
        axes.plot([bar.low, bar.high], [place, place], color=ink, lw=1.2)
        axes.plot([1.0, 1.0], [place - 0.5, place + 0.5], color=charts.GRID, lw=1.2)
        axes.annotate(  # to the right of that line, which would cross it
            f"{bench_tables.times(bar.value)}x", (max(1.0, bar.high), place), xytext=(6, 0),
            textcoords="offset points", color=ink, fontsize=9, va="center",
        )  # fmt: skip
    axes.set_xscale("log")
    values = [bar for bar in bars if bar.value is not None]
    low = min(1.0, *(bar.low for bar in values))
    high = max(1.0, *(bar.high for bar in values))
    axes.set_xlim(low / 1.15, high * (high / low) ** 0.18 * 1.1)
    steps = (1, 2, 5) if high < 100 * low else (1,)
    ticks = [step * 10**power for power in range(-3, 5) for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0.4, len(bars) + 0.6)
    axes.set_yticks(list(places), [bar.label if bar.value is not None else "" for bar in bars])
    axes.tick_params(axis="y", length=0)
    charts.finish(axes, title, ink)
    axes.grid(visible=False, axis="y")


# --- Cost over size -------------------------------------------------------------------------------


@dataclass
class Series:
    """One implementation's cost over an op's size, everything else the same."""

    impl: str
    label: str
    points: list[tuple[int, float]] = field(default_factory=list)

    def slope(self) -> "fit.PowerLaw | None":
        """The power law through its points."""
        if len(self.points) < _FITTED_POINTS:
            return None
        return fit.power_law(*zip(*self.points, strict=True))


# The field that a suite may let fall while the size grows, so that their product stays the same.
_TRADED = {"width": "rows", "seq": "batch", "vocab": "rows"}


def groups(document: dict) -> "dict[tuple, dict[str, Series]]":
    """Series by what stays the same: op, mode, quantity, and every field but the op's size.

    Or every field but it and one other, whose product with it stays the same: as many elements,
    or tokens, at each size.
    """
    found: dict[tuple, dict[str, Series]] = {}
    for row in document["rows"]:
        if row["status"] != workers.OK or row["quantity"] not in (TIME, MEMORY, WORKSPACE):
            continue
        cost = metrics.memory(row) if row["quantity"] != TIME else row["ms"]["median"]
        if not cost:
            continue
        x, case = OPS[row["op"]].x, row["case"]
        traded = _TRADED[x]
        fields = {name: held for name, held in case.items() if name != x}
        product = fields | {traded: f"{case[traded] * case[x]} in all"}
        for same in (fields, product):
            key = (row["op"], row["mode"], row["quantity"], row["isa"], tuple(same.items()))
            held = found.setdefault(key, {}).setdefault(
                row["impl"], Series(row["impl"], row["label"])
            )
            held.points.append((case[x], cost if row["quantity"] == TIME else cost / 2**20))
    return {
        key: series
        for key, series in found.items()
        if max(len(set(held.points)) for held in series.values()) >= _LEAST_POINTS
    }


def growth(document: dict) -> Iterator[Chart]:
    """Cost over size on logarithmic axes, with the fitted exponent of each line."""
    for (op, mode, quantity, isa, same), series in groups(document).items():
        parts = [f"{op}, {MODE_NAMES[mode]}", *_named(dict(same))]
        title = ", ".join(parts + ([f"held to {isa.upper()}"] if isa else []))
        draw = functools.partial(
            _draw_growth, series=list(series.values()), x=OPS[op].x, quantity=quantity, title=title
        )
        yield Chart(title, draw)


def _named(same: dict) -> list[str]:
    found = [same["dtype"]]
    if "head_dim" in same:
        found.append(f"d = {same['head_dim']}")
    found += ["causal"] if same.get("causal") else []
    found += [f"dropout {same['dropout_p']:g}"] if same.get("dropout_p") else []
    return found


def _draw_growth(
    axes: Axes, ink: str, series: list[Series], x: str, quantity: str, title: str
) -> None:
    for held in series:
        colour, marker = charts.style(held.impl)
        law = held.slope()
        # A zero has no sign: + 0.0 takes it away.
        name = held.label + (f": {x}^{round(law.exponent, 2) + 0.0:.2f}" if law else "")
        xs, ys = zip(*sorted(held.points), strict=True)
        axes.plot(xs, ys, color=colour, marker=marker, ms=5, lw=1.8, label=name)
    ticks = sorted({point[0] for held in series for point in held.points})
    names = {"seq": "sequence length N", "width": "width", "vocab": "classes"}
    unit = "milliseconds" if quantity == TIME else f"{quantity}, MiB"
    charts.log_log(axes, ticks, names.get(x, x), unit, ink)
    head, _, rest = title.partition(", ")
    charts.finish(axes, f"{head}\n{rest}", ink)


# --- Roofline -------------------------------------------------------------------------------------


def roofline(document: dict) -> Iterator[Chart]:
    """Operations a second over operations a byte, below the ceilings measured in the same run."""
    ceilings = document.get("ceilings")
    points = [
        row
        for row in document["rows"]
        if row["status"] == workers.OK and "ms" in row and row["flops"] and row["bytes"]
    ]
    if ceilings and points:
        draw = functools.partial(draw_roofline, rows=points, ceilings=ceilings)
        yield Chart("Roofline: operations a second over operations a byte", draw, (6.4, 5))


def draw_roofline(axes: Axes, ink: str, rows: list[dict], ceilings: dict) -> None:
    """Draws what rows' "flops", "bytes" and "ms" say; points of an "impl" are alike."""
    intensities = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensities) / 2, max(intensities) * 2
    slope = ceilings["copy_gbps"] / 1e3  # TFLOP/s at one operation a byte
    speeds = [row["flops"] / row["ms"]["median"] / 1e9 for row in rows]
    dtypes = {row["case"]["dtype"] for row in rows}
    flats = {
        dtype: flat for dtype, flat in ceilings["matmul_tflops"].items() if flat and dtype in dtypes
    }
    end = max([high, *(2 * flat / slope for flat in flats.values())])
    for flat in flats.values():
        xs = sorted({low, min(max(low, flat / slope), end), end})
        axes.plot(xs, [min(flat, slope * x) for x in xs], color=ink, lw=1.4)
    for names, flat in _apart(flats):
        axes.annotate(
            f"{names} product", (1.0, flat), xytext=(4, 0), textcoords="offset points",
            xycoords=axes.get_yaxis_transform(), color=ink, fontsize=9, va="center",
        )  # fmt: skip
    seen = set()
    for row, x, y in zip(rows, intensities, speeds, strict=True):
        colour, marker = charts.style(row["impl"])
        label = None if row["impl"] in seen else row["impl"]
        seen.add(row["impl"])
        axes.plot(x, y, marker, color=colour, ms=6, alpha=0.85, label=label, ls="none")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, end)
    axes.set_ylim(bottom=0.5 * min([*speeds, *flats.values()]))
    charts.decades(axes.xaxis, *axes.get_xlim())
    charts.decades(axes.yaxis, *axes.get_ylim())
    axes.set_xlabel("operations a byte", color=ink)
    axes.set_ylabel("TFLOP/s", color=ink)
    charts.finish(axes, "Roofline: ceilings measured in this run", ink)


def _apart(flats: dict[str, float]) -> list[tuple[str, float]]:
    """Names and heights of ceilings; those too near each other for two lines of text share one."""
    found: list[tuple[str, float]] = []
    for name, flat in sorted(flats.items(), key=lambda item: item[1]):
        if found and flat < 1.6 * found[-1][1]:
            names, height = found.pop()
            name, flat = f"{names}, {name}", height
        found.append((name, flat))
    return found


# --- All ------------------------------------------------------------------------------------------


def everything(document: dict) -> list[Chart]:
    """All charts of a run."""
    return [*speedups(document), *growth(document), *roofline(document)]


def png(document: dict, heading: str, path: Path) -> bool:
    """Writes the charts on one sheet; False where there is none to draw."""
    drawn = [(chart.draw, chart.size) for chart in everything(document)]
    if drawn:
        charts.png(drawn, heading, path)
    return bool(drawn)
