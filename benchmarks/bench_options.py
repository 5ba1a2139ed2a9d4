"""The options of ``fusedformer bench``: what they are, and the entries that they ask for."""

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusedformer.benchmarks import metrics, suites
from fusedformer.benchmarks.entries import Entry
from fusedformer.benchmarks.ops import attention, common, cross_entropy, models, rows
from fusedformer.benchmarks.ops.registry import OPS
from fusedformer.benchmarks.options import choice, device_of, probabilities, seconds, whole, wholes
from fusedformer.benchmarks.runner import ISA_ENVIRONMENT, Limits
from fusedformer.kernels.attention import MAX_HEAD_DIM

# Sizes of --op where no option names them: (CPU, GPU).
SIZES = {
    "batch": ("1", "4"),
    "heads": ("8", "16"),
    "kv_heads": ("0", "0"),
    "seq": ("512,1024,2048,4096", "1024,2048,4096,8192,16384"),
    "head_dim": ("64", "64,128"),
    "rows": ("4096", "16384"),
    "width": ("512,1024,4096", "768,1024,2048,4096,8192,16384"),
    "vocab": ("32768", "32768,131072"),
    "hidden": ("512", "2048"),
}
DROPOUT_OPS = ("dropout", "dropout_add_layer_norm", "bias_activation")
# Of the losses, whose rows are as wide as a vocabulary.
_LOSS_ROWS = ("1024", "16384")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options; all are text until parse(), whose errors are one sentence each."""
    what = parser.add_argument_group("what")
    what.add_argument(
        "--suite",
        metavar="NAME,...",
        help=f"named suites: {', '.join(suites.SUITES)} (default: cpu, on a GPU: gpu)",
    )
    what.add_argument("--quick", action="store_true", help="the suite at a reduced size")
    what.add_argument("--op", metavar="NAME,...", help=f"ops instead: {', '.join(OPS)}")
    what.add_argument("--match", metavar="TEXT", help="only problems whose name holds it")
    what.add_argument("--mode", metavar="MODE,...", help=f"{', '.join(common.MODES)} (fwd,fwd_bwd)")
    what.add_argument("--only", metavar="IMPL,...", help="these implementations (see --list)")
    what.add_argument("--skip", metavar="IMPL,...", help="not these implementations")
    what.add_argument("--baseline", metavar="IMPL", help="what speed-ups are against (sdpa, eager)")
    what.add_argument("--list", action="store_true", help="say what can run here, and why not")
    size = parser.add_argument_group("sizes of --op, each a number or several with commas")
    for name, (cpu, gpu) in SIZES.items():
        shown = cpu if cpu == gpu else f"{cpu}; GPU: {gpu}"
        size.add_argument(f"--{name.replace('_', '-')}", metavar="N,...", help=f"({shown})")
    size.add_argument("--dtype", metavar="TYPE,...", help="fp32, fp16, bf16 (fp32,bf16; GPU: bf16)")
    size.add_argument(
        "--dropout", metavar="P,...", help="probabilities (0; of ops that are all about it, 0.1)"
    )
    size.add_argument("--causal", help="yes, no or both (no)")
    size.add_argument("--padded", action="store_true", help="sequences of unequal lengths")
    size.add_argument("--isa", help="hold a CPU to it, both sides: avx2")
    how = parser.add_argument_group("how")
    how.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    how.add_argument("--seconds", default="5", help="of rounds for each problem (5)")
    how.add_argument("--min-rounds", default="3", help="at least so many rounds (3)")
    how.add_argument("--max-rounds", default="30", help="at most so many rounds (30)")
    how.add_argument("--timeout", default="300", help="seconds that one call of a worker may take")
    how.add_argument(
        "--base", metavar="COMMIT", help="beside another commit instead, in a worktree"
    )
    how.add_argument("--budget", metavar="SECONDS", help="for all; what is left says so (none)")
    out = parser.add_argument_group("output")
    out.add_argument("--out", metavar="DIR", default="bench", help="where the files go (bench)")
    out.add_argument("--json", metavar="FILE", help="the result file (DIR/bench.json)")
    out.add_argument("--csv", metavar="FILE", help="also as CSV; -: to stdout, instead of tables")
    out.add_argument("--plot", metavar="FILE", help="the PNG chart (DIR/bench.png)")
    out.add_argument(
        "--metrics",
        metavar="NAME,...",
        help=f"columns: {', '.join(metrics.METRICS)} ({','.join(metrics.DEFAULT)})",
    )
    out.add_argument("--resume", action="store_true", help="go on with the file that is there")


@dataclass(frozen=True)
class Options:
    """The options, checked."""

    entries: list[Entry]
    device: str
    limits: Limits
    json: Path
    plot: Path
    page: Path
    csv: str
    metrics: tuple[str, ...]
    resume: bool
    base: str | None
    said: dict


def parse(args: argparse.Namespace) -> Options:
    """The checked options.

    Raises:
        ValueError: naming the option, what was got and what is wanted.
    """
    device = device_of(args.device)
    out = Path(args.out)
    only, skip = _impls("--only", args.only), _impls("--skip", args.skip)
    entries = _of_ops(args, device) if args.op else _of_suites(args, device)
    entries = [_narrowed(entry, only, skip, args.baseline) for entry in entries]
    if args.match:
        entries = [entry for entry in entries if args.match in entry.named()]
        if not entries:
            raise ValueError(f"--match got {args.match!r}; no problem's name holds it")
    rounds = whole("--min-rounds", args.min_rounds), whole("--max-rounds", args.max_rounds)
    limits = Limits(
        seconds("--seconds", args.seconds),
        *rounds,
        seconds("--timeout", args.timeout),
        math.inf if args.budget is None else seconds("--budget", args.budget),
    )
    return Options(
        entries=[entry for entry in entries if entry.impls],
        device=device,
        limits=limits,
        json=Path(args.json) if args.json else out / "bench.json",
        plot=Path(args.plot) if args.plot else out / "bench.png",
        page=Path(args.json).with_suffix(".html") if args.json else out / "bench.html",
        csv=args.csv or "",
        metrics=_listed("--metrics", args.metrics, tuple(metrics.METRICS)) or metrics.DEFAULT,
        resume=args.resume,
        base=args.base,
        said={
            "base": args.base,
            "suite": args.suite,
            "op": args.op,
            "quick": args.quick,
            "seconds": limits.seconds,
            "min_rounds": limits.min_rounds,
            "max_rounds": limits.max_rounds,
        },
    )


def _listed(option: str, got: "str | None", wanted: Sequence[str]) -> tuple[str, ...]:
    """The names of an option with commas, each checked."""
    if got is None:
        return ()
    return tuple(choice(option, part.strip(), tuple(wanted)) for part in got.split(","))


def _impls(option: str, got: "str | None") -> tuple[str, ...]:
    return _listed(option, got, list(dict.fromkeys(i for op in OPS.values() for i in op.impls)))


def _narrowed(
    entry: Entry, only: tuple[str, ...], skip: tuple[str, ...], baseline: "str | None"
) -> Entry:
    names = [name for name in (entry.impls or OPS[entry.op].impls) if name not in skip]
    if only:
        # What is asked for by name takes part, whether the suite has it or not.
        names = [name for name in OPS[entry.op].impls if name in only]
    changes: dict = {"impls": tuple(names)}
    if baseline is not None:
        changes["baseline"] = choice("--baseline", baseline, tuple(OPS[entry.op].impls))
    return entry.at(**changes)


def _of_suites(args: argparse.Namespace, device: str) -> list[Entry]:
    for name in (*SIZES, "mode", "dtype", "dropout", "causal", "padded", "isa"):
        if getattr(args, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} goes with --op alone; suites have theirs")
    default = "gpu" if device == "cuda" else "cpu"
    names = _listed("--suite", args.suite or default, tuple(suites.SUITES))
    return [entry for name in names for entry in suites.SUITES[name](args.quick, device)]


def _of_ops(args: argparse.Namespace, device: str) -> list[Entry]:
    if args.suite:
        raise ValueError("--suite and --op both say what to measure; give one of them")
    gpu = device == "cuda"

    def sizes(name: str, default: "str | None" = None) -> tuple[int, ...]:
        option = f"--{name.replace('_', '-')}"
        got = getattr(args, name) or default or SIZES[name][gpu]
        if name == "kv_heads" and got == "0":
            return (0,)
        return wholes(option, got, MAX_HEAD_DIM if name == "head_dim" else None)

    dtype_names = args.dtype or ("bf16" if gpu else "fp32,bf16")
    dtypes = _listed("--dtype", dtype_names, tuple(common.DTYPES))

    def dropout(op: str) -> tuple[float, ...]:
        return probabilities("--dropout", args.dropout or ("0.1" if op in DROPOUT_OPS else "0"))

    causal = {"yes": (True,), "no": (False,), "both": (False, True)}[
        choice("--causal", args.causal or "no", ("yes", "no", "both"))
    ]
    isa = choice("--isa", args.isa or "", ("", *ISA_ENVIRONMENT))
    cases: dict[type, Callable[[str], list]] = {
        attention.Case: lambda op: [
            attention.Case(b, h, n, d, dtype, c, p, device, kv, args.padded)
            for b, h, kv in itertools.product(sizes("batch"), sizes("heads"), sizes("kv_heads"))
            for d, dtype, c, p in itertools.product(sizes("head_dim"), dtypes, causal, dropout(op))
            for n in sizes("seq")
        ],
        rows.Case: lambda op: [
            rows.Case(m, w, dtype, p, device)
            for m, dtype, p, w in itertools.product(
                sizes("rows"), dtypes, dropout(op), sizes("width")
            )
        ],
        cross_entropy.Case: lambda op: [
            cross_entropy.Case(m, v, h, dtype, device)
            for m, dtype, h, v in itertools.product(
                sizes("rows", _LOSS_ROWS[gpu]), dtypes, sizes("hidden"), sizes("vocab")
            )
        ],
        models.Case: lambda op: models.sizes(args.quick, device)[op],
    }
    modes = _listed("--mode", args.mode or "fwd,fwd_bwd", common.MODES)
    return [
        Entry(op, case, mode, isa=isa)
        for op in _listed("--op", args.op, tuple(OPS))
        for mode in ((models.STEP,) if OPS[op].case is models.Case else modes)
        for case in cases[OPS[op].case](op)
    ]
