"""``fusedformer bench``: implementations of an op beside each other, measured in one run.

Times are medians of rounds in which implementations take turns; beside each stands its error
against float64. docs/benchmarks.md has the method, docs/result-schema.md the result file.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from fusedformer.benchmarks import (
    base,
    bench_options,
    bench_page,
    bench_tables,
    ceilings,
    compare,
    document,
    entries,
    points,
    readme,
    suites,
    terminal,
    workers,
)
from fusedformer.benchmarks.bench_options import Options
from fusedformer.benchmarks.document import COMPLETE, CUT, Document
from fusedformer.benchmarks.measure import look
from fusedformer.benchmarks.ops.registry import OPS
from fusedformer.benchmarks.options import device_of, make_folder
from fusedformer.benchmarks.runner import Runner, worth_keeping
from fusedformer.benchmarks.tables import Table

KIND = "bench"
INTERRUPTED = 130
ACTIONS = {"compare": compare, "readme": readme}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options, and the actions that measure nothing."""
    bench_options.add_options(parser)
    actions = parser.add_subparsers(dest="action", metavar="[compare A.json B.json | readme]")
    for name, module in ACTIONS.items():
        about = (module.__doc__ or "").partition("\n")[0].partition(": ")[2]
        module.configure(actions.add_parser(name, help=about, description=about))


def run(args: argparse.Namespace) -> int:
    """Measures what the options ask for, or does an action; returns the exit code.

    Raises:
        ValueError: an option is wrong; the text is one sentence that names it.
    """
    if args.action:
        return ACTIONS[args.action].run(args)
    if args.list:
        return _list(device_of(args.device))
    options = bench_options.parse(args)
    for path in (options.json, options.plot):
        make_folder(path.parent)
    with _runner(options) as runner:
        held = _document(options, runner)
        said = held.data["environment"]
        print(f"{said['device_name']}, PyTorch {said['torch']}", file=sys.stderr, flush=True)
        held.data["rows"] = runner.rows
        try:
            _measure(runner, options, held)
            state = COMPLETE
        except KeyboardInterrupt:
            state = CUT
    held.finish(state)
    _show(options, held)
    return INTERRUPTED if state == CUT else 0


@contextlib.contextmanager
def _runner(options: Options) -> Iterator[Runner]:
    if options.base is None:
        with Runner(options.device, options.limits) as runner:
            yield runner
        return
    with (
        base.worktree(options.base) as (folder, name),
        base.BaseRunner(options.device, options.limits) as both,
    ):
        both.against(folder, name)
        yield both


def _document(options: Options, runner: Runner) -> Document:
    """The document of this run, with the rows of the one that it goes on with."""
    environment = runner.pool().run(points.describe, options.device)
    if environment.status != workers.OK:
        raise OSError(f"a worker process cannot start: {environment.reason}")
    if options.resume and options.json.is_file():
        before = document.read(options.json, KIND)
        for name in ("device_name", "torch", "triton", "fusedformer", "commit", "threads"):
            if before["environment"][name] != environment.value[name]:
                raise ValueError(
                    f"--resume: {options.json} was measured with {name} "
                    f"{before['environment'][name]!r}; here it is {environment.value[name]!r}"
                )
        runner.rows += worth_keeping(before["rows"])
    found = runner.pool().run(ceilings.measure, options.device)
    return Document(
        options.json,
        KIND,
        options.said,
        environment.value,
        ceilings=found.value,
        rows=[],
    )


def _measure(runner: Runner, options: Options, held: Document) -> None:
    held.save()
    with terminal.Progress(len(options.entries)) as progress:
        for _ in runner.run(options.entries, lambda entry: progress.step(entry.named())):
            held.save()


def _write(options: Options, held: Document) -> list[Path]:
    """The page and the charts beside the result file."""
    written = [options.json, options.page]
    options.page.write_text(bench_page.html(held.data), encoding="utf-8")
    try:
        from fusedformer.benchmarks import bench_charts
    except ImportError:
        print("Left out: the charts (matplotlib is not installed)", file=sys.stderr)
        return written
    if bench_charts.png(held.data, bench_page.setting(held.data), options.plot):
        written.append(options.plot)
    return written


def _show(options: Options, held: Document) -> None:
    if options.csv == "-":
        print(bench_tables.csv_text(held.data, options.metrics), end="")
    else:
        terminal.show(bench_tables.everything(held.data, options.metrics))
        if options.csv:
            text = bench_tables.csv_text(held.data, options.metrics)
            Path(options.csv).write_text(text, encoding="utf-8")
    written = ", ".join(map(str, _write(options, held)))
    said = f"{held.data['seconds']:.0f} s. Written: {written}"
    if held.data["state"] == CUT:
        said += f". Interrupted: --resume --json {options.json} goes on"
    print(said, file=sys.stderr)


def _list(device: str) -> int:
    """Every op and suite, every implementation, and why those that cannot run cannot."""
    body = []
    for op in OPS.values():
        case = entries.sample(op.name, device)
        refusals, _ = look(op.name, list(op.impls), case)
        for name, impl in op.impls.items():
            body.append([op.name, name, impl.version() or "", impl.about, refusals[name] or "here"])
    terminal.show([Table(f"On {device}", ["op", "implementation", "", "what", "runs"], body)])
    print(f"\nSuites: {', '.join(suites.SUITES)}")
    return 0
