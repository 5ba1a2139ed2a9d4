"""``fusedformer profile attention``: how attention's time and memory grow, measured here.

Sweeps the sequence length, and the head dimension at one length, for the implementations of
providers.py, with and without causal and dropout; fits the exponents; writes a JSON file, a PNG
chart and an HTML page. An interrupt keeps what was measured.
"""

import argparse
import time
from pathlib import Path

from fusedformer.benchmarks import (
    ceilings,
    page,
    points,
    profile_model,
    profile_page,
    profile_recurrent,
    providers,
    results,
    tables,
    terminal,
    trace,
    workers,
)
from fusedformer.benchmarks import options as options_module
from fusedformer.benchmarks.document import COMPLETE, CUT, Document
from fusedformer.benchmarks.ops import attention
from fusedformer.benchmarks.ops.attention import Case
from fusedformer.benchmarks.options import Options
from fusedformer.benchmarks.sweep import PASSES, Point, Sweep

INTERRUPTED = 130
OTHERS = {"model": profile_model, "recurrent": profile_recurrent}

# The part of the budget that measuring the ceilings may take.
_CEILINGS_PART = 0.15
# Errors are compared at the longest length of the sweep up to this one: float64 is slow.
_ERROR_SEQ = 512


def configure(command: argparse.ArgumentParser) -> None:
    """Adds what can be profiled, each with its options."""
    ops = command.add_subparsers(dest="op", required=True, metavar="OP")
    about = "time, memory and their growth with length and head dimension"
    parser = ops.add_parser("attention", help=about, description=f"attention: {about}")
    options_module.add_options(parser)
    for name, module in OTHERS.items():
        module.add_options(ops.add_parser(name, help=module.ABOUT, description=module.ABOUT))


def run(args: argparse.Namespace) -> int:
    """Runs one profile, of attention or of another; returns the exit code.

    Raises:
        ValueError: an option is wrong; the text is one sentence that names it.
    """
    if args.op in OTHERS:
        return OTHERS[args.op].run(args)
    started = time.perf_counter()
    options = options_module.parse(args)
    options_module.make_folder(options.out)
    with workers.Workers(fresh=options.device == "cpu") as pool:
        environment = pool.run(points.describe, options.device)
        if environment.status != workers.OK:
            raise OSError(f"a worker process cannot start: {environment.reason}")
        document = results.new_document(
            options.out / "attention.json",
            options.as_dict(),
            environment.value,
            options.text.as_dict() if options.text else None,
        )
        print(profile_page.setting(document.data), flush=True)
        if warning := page.busy(document.data):
            print(warning, flush=True)
        if options.text:
            print(f"Lengths from {options.text.file}, counted in {options.text.unit}.", flush=True)
        sweep = Sweep(list(options.impl), pool, options.budget, started)
        document.data["rows"] = sweep.rows
        try:
            _measure(sweep, options, document)
            state = COMPLETE
        except KeyboardInterrupt:
            state = CUT
    results.finish(document, state)
    written = _write(document, options.out)
    if args.trace and state == COMPLETE:
        case = Case(
            options.batch, options.heads, options.seq[len(options.seq) // 2], options.head_dim,
            options.dtype, options.causal[0], options.dropout[-1], options.device,
        )  # fmt: skip
        forward, backward = providers.call("fused", case, attention.inputs(case))
        for said in trace.write(Path(args.trace), lambda: backward(forward()), case.device):
            print(said)
    terminal.show(tables.everything(document.data))
    print()
    for line in document.data["left_out"]:
        print(f"Left out: {line}")
    if state == CUT:
        print("Interrupted: the files hold what was measured up to then.")
    print(f"{document.data['seconds']:.0f} s. Written: {', '.join(map(str, written))}")
    return INTERRUPTED if state == CUT else 0


def _measure(sweep: Sweep, options: Options, document: Document) -> None:
    plan = options.plan()
    with terminal.Progress(len(plan) + 1) as progress:

        def before(number: int, point: Point) -> None:
            case = point.case
            what = results.variant_label(case.causal, case.dropout_p)
            if number == 1:
                progress.step(f"N = {case.seq}, d = {case.head_dim}, {what}")
            else:
                left = max(0.0, sweep.left())
                progress.stay(f"more times, pass {number} of {PASSES} at most, {left:.0f} s left")

        _look_around(sweep, options, document)
        progress.step("errors against float64")
        document.data["errors"] = _errors(sweep, options)
        document.save()
        for _ in sweep.run(plan, before):
            document.save()


def _look_around(sweep: Sweep, options: Options, document: Document) -> None:
    """The machine's ceilings and its memory, as they are before the first measurement."""
    case = options.plan()[0].case
    looked = sweep.pool.run(points.look, sweep.impls, case)
    if looked.status == workers.OK:
        document.data["available_bytes"] = looked.value[1]
    limit = _CEILINGS_PART * options.budget
    found = sweep.pool.run(ceilings.measure, options.device, timeout=limit)
    document.data["ceilings"] = found.value


def _errors(sweep: Sweep, options: Options) -> list[dict]:
    short = [n for n in options.seq if n <= _ERROR_SEQ]
    base = next(point.case for point in options.plan() if point.sweep == "seq")
    base = base.at(seq=max(short) if short else _ERROR_SEQ)
    found = []
    for causal in options.causal:
        for dropout_p in options.dropout:
            case = base.at(causal=causal, dropout_p=dropout_p)
            looked = sweep.pool.run(points.look, sweep.impls, case)
            if looked.status != workers.OK:
                continue
            for impl, backend in looked.value[0].items():
                outcome = sweep.pool.run(points.errors, impl, case)
                if outcome.status == workers.OK and outcome.value is None:
                    continue  # its dropout mask cannot be repeated
                found.append(
                    {
                        "impl": impl,
                        "label": providers.label(impl, backend),
                        "causal": causal,
                        "dropout_p": dropout_p,
                        "seq": case.seq,
                        "status": outcome.status,
                        "reason": outcome.reason,
                        **(outcome.value or {"forward": None, "backward": None}),
                    }
                )
    return found


def _write(document: Document, folder: Path) -> list[Path]:
    """Writes chart and page beside the JSON file; what cannot be drawn goes to "left_out"."""
    data, left_out = document.data, document.data["left_out"]
    written = [document.path]
    try:
        from fusedformer.benchmarks import profile_charts
    except ImportError:
        left_out.append("the PNG chart and the page's charts (matplotlib is not installed)")
    else:
        if data["rows"]:  # an interrupt may come before the first
            profile_charts.png(data, profile_page.setting(data), folder / "attention.png")
            written.append(folder / "attention.png")
    if not terminal.HAS_RICH:
        left_out.append("the progress bar and ruled tables (rich is not installed)")
    (folder / "attention.html").write_text(profile_page.html(data), encoding="utf-8")
    written.append(folder / "attention.html")
    document.save()
    return written
