"""``fusedformer profile model``: a GPT's training step by its parts, over sequence length.

Every part is timed alone, forward with backward, on the model's sizes; the step as a whole beside
them. Shows where the quadratic part, attention, overtakes the feed-forward layers.
"""

import argparse
from pathlib import Path

from fusedformer.benchmarks import fit, model_parts, points, terminal, timing, trace, workers
from fusedformer.benchmarks import profile_model_page as view
from fusedformer.benchmarks.document import COMPLETE, CUT, Document
from fusedformer.benchmarks.ops import common
from fusedformer.benchmarks.ops.models import Case
from fusedformer.benchmarks.options import choice, device_of, make_folder, seconds, whole, wholes

KIND = "profile model"
INTERRUPTED = 130
ABOUT = "a training step by its parts, over sequence length"

# (CPU, GPU), with lengths at which attention has overtaken the feed-forward layers. The GPU's model
# is GPT-2's smallest.
_DEFAULTS = {
    "seq": ("128,256,512,1024,2048,4096,8192", "512,1024,2048,4096,8192,16384"),
    "batch": ("1", "1"),
    "layers": ("2", "12"),
    "width": ("256", "768"),
    "heads": ("4", "12"),
    "vocab": ("4096", "50257"),
    "dtype": ("fp32", "bf16"),
}
_CALL_SECONDS = 300.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options; all are text until run(), whose errors are one sentence each."""
    for name, (cpu, gpu) in _DEFAULTS.items():
        shown = cpu if cpu == gpu else f"{cpu}; GPU: {gpu}"
        parser.add_argument(f"--{name}", help=f"({shown})")
    parser.add_argument("--dropout", default="0.1", help="probability, everywhere (0.1)")
    parser.add_argument("--seconds", default="3", help="of rounds for each length (3)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    parser.add_argument(
        "--out", metavar="DIR", default="profile", help="where the files go (profile)"
    )
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="also a torch.profiler trace of a step at the longest length",
    )


def run(args: argparse.Namespace) -> int:
    """Runs one profile; returns the exit code.

    Raises:
        ValueError: an option is wrong; the text is one sentence that names it.
    """
    device = device_of(args.device)
    values = {
        name: getattr(args, name) or default[device == "cuda"]
        for name, default in _DEFAULTS.items()
    }
    lengths = wholes("--seq", values["seq"])
    batch, layers, width, heads, vocab = (
        whole(f"--{name}", values[name]) for name in ("batch", "layers", "width", "heads", "vocab")
    )
    if width % heads:
        raise ValueError(f"--width got {width}; it wants a multiple of --heads, {heads}")
    dtype = choice("--dtype", values["dtype"], tuple(common.DTYPES))
    try:
        dropout = float(args.dropout)
    except ValueError:
        dropout = -1.0
    if not 0 <= dropout < 1:
        raise ValueError(f"--dropout got {args.dropout!r}; it wants a number from 0 to below 1")
    each = seconds("--seconds", args.seconds)
    base = Case(batch, lengths[0], layers, width, heads, vocab, dtype, device, dropout)
    out = Path(args.out)
    make_folder(out)
    with workers.Workers(fresh=device == "cpu") as pool:
        environment = pool.run(points.describe, device)
        if environment.status != workers.OK:
            raise OSError(f"a worker process cannot start: {environment.reason}")
        options = base.as_dict() | {"seq": list(lengths), "seconds": each}
        document = Document(
            out / "model.json", KIND, options, environment.value, rows=[], fits=[], crossing=None
        )
        try:
            _measure(document, pool, base, lengths, each)
            state = COMPLETE
        except KeyboardInterrupt:
            state = CUT
    document.data |= laws(document.data["rows"])
    document.finish(state)
    said = view.write(document.data, out)
    if args.trace and state == COMPLETE:
        step = model_parts.parts(base.at(seq=lengths[-1]))
        said += trace.write(Path(args.trace), lambda: [p.call() for p in step.values()], device)
    terminal.show(view.tables(document.data))
    print(f"{document.data['seconds']:.0f} s. Written: {', '.join(said)}")
    return INTERRUPTED if state == CUT else 0


def _measure(
    document: Document, pool: workers.Workers, base: Case, lengths: tuple[int, ...], each: float
) -> None:
    with terminal.Progress(len(lengths)) as progress:
        for seq in lengths:
            progress.step(f"N = {seq}")
            found = pool.run(model_parts.times, base.at(seq=seq), each, 30, timeout=_CALL_SECONDS)
            row: dict = {"seq": seq, "status": found.status, "reason": found.reason, "parts": {}}
            for name, held in (found.value or {}).items():
                summary = timing.summary([ms * held["count"] for ms in held["ms"]])
                row["parts"][name] = {"ms": summary, "count": held["count"], "flops": held["flops"]}
            document.data["rows"].append(row)
            document.save()


def laws(rows: list[dict]) -> dict:
    """The exponent of each part, and where attention overtakes the feed-forward layers.

    Returns:
        {"fits": [...], "crossing": {...}}; see fit.fit_series() and fit.crossing().
    """
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, held in row["parts"].items():
            series.setdefault(name, []).append((row["seq"], held["ms"]["median"]))
    found = [{"part": name} | fit.fit_series(held, 0.1, "0.1 ms") for name, held in series.items()]
    crossing = fit.crossing(
        series.get(model_parts.FEED_FORWARD, []), series.get(model_parts.ATTENTION, [])
    )
    return {"fits": found, "crossing": crossing}
