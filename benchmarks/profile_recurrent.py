"""``fusedformer profile recurrent``: recurrent encoder-decoders beside the Transformer.

How long a training step takes as sequences grow, and what each model recalls over a distance.
"""

import argparse
from functools import partial
from pathlib import Path

from fusedformer.benchmarks import (
    bench_page,
    fit,
    page,
    points,
    recurrent,
    terminal,
    timing,
    workers,
)
from fusedformer.benchmarks.document import COMPLETE, CUT, Document
from fusedformer.benchmarks.options import device_of, make_folder, seconds, whole, wholes
from fusedformer.benchmarks.tables import Table, number

KIND = "profile recurrent"
INTERRUPTED = 130
ABOUT = "recurrent encoder-decoders beside the Transformer: speed, and recall over a distance"
_TITLE = "What came before the Transformer"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options; all are text until run(), whose errors are one sentence each."""
    add = parser.add_argument
    add("--seq", default="32,64,128,256,512", help="lengths of the timed step (32 to 512)")
    add("--distances", default="8,16,32,64,128,256,512", help="of the recall task (8 to 512)")
    add("--steps", default="200", help="training steps of each model at each distance (200)")
    add("--width", default="64", help="of every model (64)")
    add("--batch", default="32", help="sequences in a step (32)")
    add("--seconds", default="2", help="of rounds for each length (2)")
    add("--device", default="auto", help="auto, cpu or cuda (auto)")
    add("--out", metavar="DIR", default="profile", help="where the files go (profile)")


def run(args: argparse.Namespace) -> int:
    """Runs one profile; returns the exit code.

    Raises:
        ValueError: an option is wrong; the text is one sentence that names it.
    """
    device = device_of(args.device)
    lengths, distances = wholes("--seq", args.seq), wholes("--distances", args.distances)
    steps, width, batch = (
        whole(f"--{name}", getattr(args, name)) for name in ("steps", "width", "batch")
    )
    if width % 4:
        raise ValueError(f"--width got {width}; it wants a multiple of 4, the Transformer's heads")
    each = seconds("--seconds", args.seconds)
    out = Path(args.out)
    make_folder(out)
    options = {
        "seq": list(lengths), "distances": list(distances), "steps": steps, "width": width,
        "batch": batch, "seconds": each, "device": device,
    }  # fmt: skip
    with (
        workers.Workers(fresh=False) as pool,
        terminal.Progress(len(lengths) + len(distances) * len(recurrent.MODELS)) as progress,
    ):
        environment = pool.run(points.describe, device)
        if environment.status != workers.OK:
            raise OSError(f"a worker process cannot start: {environment.reason}")
        document = Document(
            out / "recurrent.json", KIND, options, environment.value, times=[], recall=[], fits=[]
        )
        try:
            for length in lengths:
                progress.step(f"a step of length {length}")
                found = pool.run(recurrent.times, length, width, batch, device, each)
                document.data["times"] += _times(length, found)
                document.save()
            for distance in distances:
                for name in recurrent.MODELS:
                    progress.step(f"recall over {distance}: {name}")
                    asked = pool.run(recurrent.recall, name, distance, width, steps, batch, device)
                    held = {"model": name, "distance": distance}
                    held |= {"status": asked.status, "reason": asked.reason}
                    document.data["recall"].append(held | (asked.value or {}))
                    document.save()
            state = COMPLETE
        except KeyboardInterrupt:
            state = CUT
    document.data["fits"] = _fits(document.data["times"])
    document.finish(state)
    said = _write(document.data, out)
    terminal.show(tables(document.data))
    print(f"{document.data['seconds']:.0f} s. Written: {', '.join(said)}")
    return INTERRUPTED if state == CUT else 0


def _times(length: int, found: workers.Outcome) -> list[dict]:
    rows = []
    for name in recurrent.MODELS:
        row = {
            "model": name,
            "seq": length,
            "sequential_steps": recurrent.sequential_steps(name, length),
            "status": found.status,
            "reason": found.reason,
        }
        held = (found.value or {}).get(name, {})
        if "error" in held:
            failed = workers.failure(held["error"])
            row |= {"status": failed.status, "reason": failed.reason}
        elif held:
            row["ms"] = timing.summary(held["ms"])
        rows.append(row)
    return rows


def _fits(rows: list[dict]) -> list[dict]:
    return [
        {"model": name}
        | fit.fit_series(
            [(r["seq"], r["ms"]["median"]) for r in rows if r["model"] == name and "ms" in r],
            0.1,
            "0.1 ms",
        )
        for name in recurrent.MODELS
    ]


# --- What is shown --------------------------------------------------------------------------------


def tables(data: dict) -> list[Table]:
    """Times over length with their exponents, then accuracy and gradient over distance."""
    names = recurrent.MODELS
    by_length: dict[int, dict[str, dict]] = {}
    for row in data["times"]:
        by_length.setdefault(row["seq"], {})[row["model"]] = row
    body = [
        [str(length)]
        + [
            f"{number(row['ms']['median'])} ms, {row['sequential_steps']} in turn"
            if "ms" in (row := rows[name])
            else row["status"]
            for name in names
        ]
        for length, rows in by_length.items()
    ]
    notes = tuple(
        f"{law['model']}: N^{law['exponent']:.2f} ({law['low']:.2f} to {law['high']:.2f})"
        if law["fitted"]
        else f"{law['model']}: not fitted: {law['reason']}"
        for law in data["fits"]
    )
    found = [Table("A training step: its time, and steps that wait", ["N", *names], body, notes)]
    by_distance: dict[int, dict[str, dict]] = {}
    for row in data["recall"]:
        by_distance.setdefault(row["distance"], {})[row["model"]] = row
    body = [
        [str(distance)]
        + [
            f"{row['accuracy']:.0%}, {row['gradient']:.0e}"
            if "accuracy" in (row := rows.get(name, {"status": "not measured"}))
            else row["status"]
            for name in names
        ]
        for distance, rows in by_distance.items()
    ]
    if body:
        guess = f"Guessing is right in {1 / recurrent.SYMBOLS:.0%}."
        found.append(
            Table(
                "Recall over a distance: accuracy, and the gradient that arrives (first over last)",
                ["distance", *names],
                body,
                (guess,),
            )
        )
    return found


def _write(data: dict, folder: Path) -> list[str]:
    written = [str(folder / "recurrent.json"), str(folder / "recurrent.html")]
    drawn: list[tuple[str, str]] = []
    try:
        from fusedformer.benchmarks import charts
    except ImportError:
        written.append("no charts: matplotlib is not installed")
    else:
        draws = {
            title: partial(_draw, rows=data[part], x=x, quantity=quantity, title=title, unit=unit)
            for title, part, x, quantity, unit in _CHARTS
            if any(quantity in row for row in data[part])
        }
        if draws:
            sheet = [(draw, charts.SIZE) for draw in draws.values()]
            charts.png(sheet, bench_page.setting(data), folder / "recurrent.png")
            written.append(str(folder / "recurrent.png"))
        drawn = [(t, charts.svg(d, f"r{i}-")) for i, (t, d) in enumerate(draws.items())]
    html = page.page(
        _TITLE,
        [
            *page.heading(_TITLE, bench_page.setting(data), data),
            page.figures("Speed and recall", drawn),
            *map(page.table, tables(data)),
            page.facts(data),
        ],
    )
    (folder / "recurrent.html").write_text(html, encoding="utf-8")
    return written


_CHARTS = (
    ("Time of a training step", "times", "seq", "ms", "milliseconds"),
    ("Accuracy of recall", "recall", "distance", "accuracy", "share that is right"),
    ("Gradient at the first token", "recall", "distance", "gradient", "over that at the last"),
)
_STYLES = {"context vector": "plain", "recurrent attention": "sdpa", "transformer": "fused"}


def _draw(axes, ink: str, rows: list[dict], x: str, quantity: str, title: str, unit: str) -> None:
    from fusedformer.benchmarks import charts

    for name in recurrent.MODELS:
        known = [
            (row[x], row[quantity]["median"] if quantity == "ms" else row[quantity])
            for row in rows
            if row["model"] == name and quantity in row
        ]
        colour, marker = charts.style(_STYLES[name])
        if known:
            xs, ys = zip(*known, strict=True)
            axes.plot(xs, ys, color=colour, marker=marker, ms=5, lw=1.8, label=name)
    ticks = sorted({row[x] for row in rows})
    label = "sequence length N" if x == "seq" else "distance"
    charts.log_log(axes, ticks, label, unit, ink)
    if quantity == "accuracy":
        axes.set_yscale("linear")
        axes.set_ylim(0, 1.05)
        axes.axhline(1 / recurrent.SYMBOLS, color=ink, lw=1.0, ls=":", label="guessing")
    charts.finish(axes, title, ink)
