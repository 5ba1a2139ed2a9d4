"""The options of ``fusedformer profile attention``: defaults, and a sentence for each error."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from fusedformer.benchmarks import providers, text_lengths
from fusedformer.benchmarks.ops import common
from fusedformer.benchmarks.ops.attention import Case
from fusedformer.benchmarks.sweep import Point
from fusedformer.kernels.attention import MAX_HEAD_DIM

# The GPU's batch and lengths are such that at least five lengths take over a millisecond.
DEFAULTS = {
    "cpu": {
        "seq": "256,512,768,1024,1536,2048,3072,4096",
        "batch": "1",
        "heads": "8",
        "dtype": "fp32",
    },
    "cuda": {
        "seq": "512,1024,2048,4096,6144,8192,12288,16384,24576,32768",
        "batch": "4",
        "heads": "16",
        "dtype": "bf16",
    },
}
HEAD_DIM_SEQ = {"cpu": 1024, "cuda": 4096}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options; all are text until parse(), whose errors are one sentence each."""
    add = parser.add_argument
    add(
        "--seq",
        metavar="N,N,...",
        help="sequence lengths (default: 256 to 4096, GPU: 512 to 32768)",
    )
    add("--heads", metavar="H", help="number of heads (default: 8, GPU: 16)")
    add("--head-dim", metavar="D", default="64", help="head dimension of the length sweep (64)")
    add(
        "--head-dim-sweep",
        metavar="D,D,...",
        default="16,32,64,128,256",
        help="head dimensions of the second sweep; 0 leaves it out (16,32,64,128,256)",
    )
    add("--head-dim-seq", metavar="N", help="sequence length of that sweep (1024, GPU: 4096)")
    add("--batch", metavar="B", help="batch size (default: 1, GPU: 4)")
    add("--dtype", help="fp32, fp16 or bf16 (default: fp32, GPU: bf16)")
    add("--causal", default="both", help="yes, no or both (both)")
    add("--dropout", metavar="P,P,...", default="0,0.1", help="dropout probabilities (0,0.1)")
    add(
        "--impl",
        metavar="NAME,...",
        default=",".join(providers.IMPLS),
        help=f"which of {', '.join(providers.IMPLS)} (all)",
    )
    add(
        "--text", metavar="FILE", help="take the lengths and their weights from a text's paragraphs"
    )
    add(
        "--tokenizer",
        metavar="FILE",
        help="count --text in tokens of this tokenizer.json (default: UTF-8 bytes)",
    )
    add("--device", default="auto", help="auto, cpu or cuda (auto)")
    add(
        "--budget",
        metavar="SECONDS",
        default="150",
        help="for measuring; what would go over it is left out and said so (150)",
    )
    add("--out", metavar="DIR", default="profile", help="where the files go (profile)")
    add("--trace", metavar="FILE", help="also a torch.profiler trace of ours, of a middle length")


@dataclass(frozen=True)
class Options:
    """The options, checked; see add_options()."""

    seq: tuple[int, ...]
    heads: int
    head_dim: int
    head_dim_sweep: tuple[int, ...]
    head_dim_seq: int
    batch: int
    dtype: str
    causal: tuple[bool, ...]
    dropout: tuple[float, ...]
    impl: tuple[str, ...]
    device: str
    budget: float
    out: Path
    text: "text_lengths.TextLengths | None"

    def as_dict(self) -> dict:
        """JSON-ready; the text has a place of its own in the document."""
        names = [name for name in self.__dataclass_fields__ if name not in ("text", "out")]
        held = {name: getattr(self, name) for name in names}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in held.items()}

    def plan(self) -> list[Point]:
        """The points of both sweeps: head dimensions first, which are quick, then lengths."""
        base = Case(
            self.batch, self.heads, self.seq[0], self.head_dim, self.dtype, device=self.device
        )
        first = base.at(seq=self.head_dim_seq, causal=self.causal[0], dropout_p=self.dropout[0])
        points = [Point("head_dim", first.at(head_dim=d)) for d in self.head_dim_sweep]
        return points + [
            Point("seq", base.at(seq=n, causal=causal, dropout_p=p))
            for n in self.seq
            for causal in self.causal
            for p in self.dropout
        ]


def parse(args: argparse.Namespace) -> Options:
    """The checked options.

    Raises:
        ValueError: naming the option, what was got and what is wanted.
    """
    device = device_of(args.device)
    defaults = DEFAULTS[device]
    if args.text is not None and args.seq is not None:
        raise ValueError("--seq and --text both set the lengths; give one of them")
    if args.tokenizer is not None and args.text is None:
        raise ValueError("--tokenizer counts the tokens of --text FILE, which is missing")
    text = None if args.text is None else text_lengths.read(args.text, args.tokenizer)
    if text is not None:
        seq = tuple(sorted({part.length for part in text.bins}))
    else:
        seq = wholes("--seq", args.seq or defaults["seq"])
    sweep = args.head_dim_sweep
    if text is not None and sweep == "16,32,64,128,256":
        sweep = "0"  # a text says nothing of head dimensions
    dims = () if sweep.strip() == "0" else wholes("--head-dim-sweep", sweep, MAX_HEAD_DIM)
    return Options(
        seq=seq,
        heads=whole("--heads", args.heads or defaults["heads"]),
        head_dim=whole("--head-dim", args.head_dim, MAX_HEAD_DIM),
        head_dim_sweep=dims,
        head_dim_seq=whole("--head-dim-seq", args.head_dim_seq or str(HEAD_DIM_SEQ[device])),
        batch=whole("--batch", args.batch or defaults["batch"]),
        dtype=choice("--dtype", args.dtype or defaults["dtype"], tuple(common.DTYPES)),
        causal={"yes": (True,), "no": (False,), "both": (False, True)}[
            choice("--causal", args.causal, ("yes", "no", "both"))
        ],
        dropout=probabilities("--dropout", args.dropout),
        impl=_names(args.impl),
        device=device,
        budget=seconds("--budget", args.budget),
        out=Path(args.out),
        text=text,
    )


# --- Checks that other commands share; each raises ValueError with one sentence -------------------


def device_of(got: str) -> str:
    """"cpu" or "cuda", of an option --device that may say "auto"."""
    device = choice("--device", got, ("auto", "cpu", "cuda"))
    # Devices are counted through the driver's library: CUDA itself stays untouched here.
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ValueError("--device got 'cuda'; there is no CUDA GPU that this PyTorch can use")
    return ("cuda" if has_gpu else "cpu") if device == "auto" else device


def choice(option: str, got: str, wanted: tuple[str, ...]) -> str:
    """One of the names wanted."""
    if got not in wanted:
        raise ValueError(f"{option} got {got!r}; it wants one of {', '.join(wanted)}")
    return got


def whole(option: str, got: str, high: "int | None" = None) -> int:
    """A whole number from 1 to ``high``."""
    bound = f" from 1 to {high}" if high else " of at least 1"
    try:
        value = int(got)
    except ValueError:
        value = 0
    if value < 1 or (high and value > high):
        raise ValueError(f"{option} got {got!r}; it wants a whole number{bound}")
    return value


def wholes(option: str, got: str, high: "int | None" = None) -> tuple[int, ...]:
    """Whole numbers from 1 to ``high`` with commas between them, sorted, each once."""
    bound = f" from 1 to {high}" if high else " of at least 1"
    try:
        values = {whole(option, part.strip(), high) for part in got.split(",")}
    except ValueError:
        raise ValueError(
            f"{option} got {got!r}; it wants whole numbers{bound}, such as 32,64,128"
        ) from None
    return tuple(sorted(values))


def names_with_commas(got: str) -> tuple[str, ...]:
    """The names of an option, not checked."""
    return tuple(part.strip() for part in got.split(","))


def probabilities(option: str, got: str) -> tuple[float, ...]:
    """Numbers from 0 to below 1 with commas between them, sorted, each once."""
    try:
        values = {float(part) for part in got.split(",")}
    except ValueError:
        values = {math.nan}
    if not all(0 <= value < 1 for value in values):
        raise ValueError(
            f"{option} got {got!r}; it wants numbers from 0 to below 1, such as 0,0.1"
        )
    return tuple(sorted(values))


def _names(got: str) -> tuple[str, ...]:
    names = names_with_commas(got)
    if unknown := [name for name in names if name not in providers.IMPLS]:
        raise ValueError(
            f"--impl got {unknown[0]!r}; it wants some of {', '.join(providers.IMPLS)}, with commas"
        )
    return tuple(name for name in providers.IMPLS if name in names)


def seconds(option: str, got: str) -> float:
    """A number above 0."""
    try:
        value = float(got)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ValueError(f"{option} got {got!r}; it wants a number of seconds above 0")
    return value


def make_folder(out: Path) -> None:
    """Makes the folder of --out.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be a folder: {error.strerror}") from None
