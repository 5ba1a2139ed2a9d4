"""Tables, page and charts of a model's profile by its parts."""

from functools import partial
from pathlib import Path

from fusedformer.benchmarks import bench_page, page, workers
from fusedformer.benchmarks.model_parts import ATTENTION, FEED_FORWARD, WHOLE
from fusedformer.benchmarks.tables import Table, number

_TITLE = "Where a training step spends its time"


def tables(document: dict) -> list[Table]:
    """Milliseconds and shares of each part at each length, and the exponents."""
    names = _parts(document)
    body = []
    for row in document["rows"]:
        if row["status"] != workers.OK:
            body.append([str(row["seq"]), f"{row['status']}: {row['reason']}", *[""] * len(names)])
            continue
        held = {name: found["ms"]["median"] for name, found in row["parts"].items()}
        body.append(
            [
                str(row["seq"]),
                number(held[WHOLE]),
                *(f"{number(held[name])} ({held[name] / held[WHOLE]:.0%})" for name in names),
            ]
        )
    notes = (
        "Each part alone, times its number; their sum need not be the whole.",
        reading(document),
    )
    found = [Table("Milliseconds of a step, and its parts", ["N", WHOLE, *names], body, notes)]
    laws = [
        [
            law["part"],
            f"{law['exponent']:.2f} ({law['low']:.2f} to {law['high']:.2f})"
            if law["fitted"]
            else f"not fitted: {law['reason']}",
        ]
        for law in document["fits"]
    ]
    if laws:
        found.append(Table("Exponent k of time ~ N^k, with its 95% range", ["part", "k"], laws))
    return found


def reading(document: dict) -> str:
    """Where attention overtakes the feed-forward layers, in a sentence."""
    crossing = document["crossing"] or {"kind": "not measured"}
    if crossing["kind"] == "at":
        return (
            f"Attention takes longer than the feed-forward layers from N = {crossing['x']:.0f} on."
        )
    return {
        "never": "Attention takes less than the feed-forward layers at every length measured.",
        "from the first": "Attention takes longer than the feed-forward layers at every length.",
    }.get(crossing["kind"], "Too few lengths to compare attention with the feed-forward layers.")


def _parts(document: dict) -> list[str]:
    names = [name for row in document["rows"] for name in row["parts"] if name != WHOLE]
    return list(dict.fromkeys(names))


def write(document: dict, folder: Path) -> list[str]:
    """Writes page and chart beside the JSON file; the paths, and what was left out."""
    written = [str(folder / "model.json"), str(folder / "model.html")]
    svgs: list[tuple[str, str]] = []
    left_out = ""
    if any(row["status"] == workers.OK for row in document["rows"]):
        try:
            from fusedformer.benchmarks import charts
        except ImportError:
            left_out = "no charts: matplotlib is not installed"
        else:
            draws = (
                partial(_draw_times, document=document),
                partial(_draw_shares, document=document),
            )
            drawn = [(draw, charts.SIZE) for draw in draws]
            charts.png(drawn, bench_page.setting(document), folder / "model.png")
            written.append(str(folder / "model.png"))
            titles = ("Time of the parts over length", "Share of the parts over length")
            svgs = [
                (title, charts.svg(draw, f"m{i}-"))
                for i, (title, draw) in enumerate(zip(titles, draws, strict=True))
            ]
    options = document["options"]
    what = f"GPT of {options['layers']} layers of {options['width']}, {options['dtype']}"
    html = page.page(
        _TITLE,
        [
            *page.heading(_TITLE, f"{what}; {bench_page.setting(document)}", document),
            *page.paragraphs([reading(document)]),
            page.figures("Over sequence length", svgs),
            *map(page.table, tables(document)),
            page.facts(document),
        ],
    )
    (folder / "model.html").write_text(html, encoding="utf-8")
    return [*written, left_out] if left_out else written


# --- Charts ---------------------------------------------------------------------------------------

_COLOURS = {
    ATTENTION: "#d55e00",
    FEED_FORWARD: "#2f81d8",
    "projections": "#17a2b8",
    "norms, dropout, residuals": "#0f9d74",
    "output and loss": "#a064d8",
    "embedding": "#c49a00",
}


def _series(document: dict) -> "tuple[list[int], dict[str, list[float]]]":
    rows = [row for row in document["rows"] if row["status"] == workers.OK]
    names = [*_parts(document), WHOLE]
    return [row["seq"] for row in rows], {
        name: [row["parts"][name]["ms"]["median"] for row in rows] for name in names
    }


def _draw_times(axes, ink: str, document: dict) -> None:
    from fusedformer.benchmarks import charts

    xs, series = _series(document)
    for marker, (name, ys) in zip("osv^DPx*", series.items(), strict=False):
        colour = _COLOURS.get(name, charts.GRID)
        axes.plot(xs, ys, color=colour, marker=marker, ms=5, lw=1.8, label=name)
    charts.log_log(axes, xs, "sequence length N", "milliseconds of a step", ink)
    charts.finish(axes, "Time of each part", ink)


def _draw_shares(axes, ink: str, document: dict) -> None:
    from fusedformer.benchmarks import charts

    xs, series = _series(document)
    parts = {name: ys for name, ys in series.items() if name != WHOLE}
    totals = [sum(ys[i] for ys in parts.values()) for i in range(len(xs))]
    shares = [[100 * y / t for y, t in zip(ys, totals, strict=True)] for ys in parts.values()]
    axes.stackplot(
        xs,
        shares,
        labels=list(parts),
        colors=[_COLOURS.get(n, charts.GRID) for n in parts],
        alpha=0.9,
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [str(x) for x in xs])
    axes.set_xlim(xs[0], xs[-1] if len(xs) > 1 else 2 * xs[0])
    axes.set_ylim(0, 100)
    axes.set_xlabel("sequence length N", color=ink)
    axes.set_ylabel("percent of the parts' sum", color=ink)
    charts.finish(axes, "Share of each part", ink)
