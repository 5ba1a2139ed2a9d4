"""The named suites of `fusedformer bench`: which problems, who takes part, and what is aimed at."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fusedformer.benchmarks.ops import attention, rows
from fusedformer.benchmarks.ops.registry import OPS

TIME, MEMORY, OVERHEAD = "time", "memory", "overhead"

MODE_NAMES = {"fwd": "forward", "bwd": "backward", "fwd_bwd": "forward+backward"}


@dataclass(frozen=True)
class Entry:
    """One problem in one mode, measured for several implementations.

    Args:
        op: its name.
        case: the problem.
        mode: one of common.MODES.
        title: how the table calls it; "" makes one of the problem.
        impls: names of the op's implementations; empty for all.
        baseline: what ratios are taken against; "" for default_baseline().
        quantity: "time", "memory" (the peak beyond the inputs) or "overhead" (the calling thread's
            time).
        at_least, aim: goals for the ratio baseline / fused, where there are.
        isa: the instruction set that a CPU is held to, on both sides; "" for its best.
    """

    op: str
    case: Any
    mode: str
    title: str = ""
    impls: tuple[str, ...] = ()
    baseline: str = ""
    quantity: str = TIME
    at_least: float | None = None
    aim: float | None = None
    isa: str = ""

    def key(self) -> str:
        """What tells it from every other entry, the same in every run."""
        fields = ",".join(f"{name}={value}" for name, value in self.case.as_dict().items())
        return "/".join(filter(None, (self.op, self.mode, self.quantity, fields, self.isa)))

    def named(self) -> str:
        """The title, or one made of the problem."""
        return self.title or f"{self.op}, {problem(self.case)}: {MODE_NAMES[self.mode]}"


def problem(case: Any) -> str:
    """A problem in a few words, such as "bf16, N = 4096, d = 64, causal, dropout 0.1"."""
    parts = [case.dtype]
    if isinstance(case, attention.Case):
        parts.append(f"N = {case.seq}, d = {case.head_dim}")
        parts += [f"{case.kv_heads} heads of keys"] if case.group > 1 else []
        parts += ["causal"] * case.causal + ["padded"] * case.padded
    elif isinstance(case, rows.Case):
        parts.append(f"{case.rows} x {case.width}")
    else:
        parts.append(f"{case.rows} tokens, {case.vocab} classes")
    parts += [f"dropout {case.dropout_p:g}"] if case.dropout_p else []
    return ", ".join(parts)


def changed(entry: Entry, **changes: Any) -> Entry:
    """An entry with some fields changed."""
    return replace(entry, **changes)


def default_baseline(op: str) -> str:
    """What an op's ratios are taken against: torch's SDPA, elsewhere eager PyTorch."""
    return "sdpa" if op == "attention" else OPS[op].eager


_CPU_ATTENTION = ("fused", "sdpa", "plain", "compile")


def cpu(quick: bool = False, device: str = "cpu") -> list[Entry]:
    """What the C++ kernels are held to, each beside PyTorch: see docs/benchmarks.md."""
    if device != "cpu":
        raise ValueError(f"--suite cpu is for a CPU; --device is {device!r}")
    seq, long = (256, 512) if quick else (4096, 8192)
    base = attention.Case(1, 8, seq, 64)
    entries = [
        _attention(base, "fwd", "bf16", False, 4.3, 5.0),
        _attention(base, "fwd", "bf16", True, 4.8, 5.6),
        _attention(base, "fwd", "fp32", False, 2.3, 2.6),
        _attention(base, "fwd", "fp32", True, 2.5, 2.9),
        _attention(base, "fwd_bwd", "bf16", False, 3.4, 4.0),
        _attention(base, "fwd_bwd", "bf16", True, 3.6, 4.3),
        _attention(base, "fwd_bwd", "fp32", False, 2.3, 2.6),
        _attention(base, "fwd_bwd", "fp32", True, 2.6, 3.0),
    ]
    dropped = base.at(dropout_p=0.1)
    entries += [
        _attention(dropped, "fwd", "bf16", False, 33, 40),
        _attention(dropped, "fwd_bwd", "bf16", False, 16, 19),
        _attention(dropped, "fwd", "fp32", False, 18, 21),
        _attention(dropped, "fwd_bwd", "fp32", False, 8.3, 9.5),
    ]
    for mode in ("fwd", "fwd_bwd"):
        what = f"attention, bf16, N = {long}, full, dropout 0.1: peak memory, {MODE_NAMES[mode]}"
        case = dropped.at(seq=long, dtype="bf16")
        entries.append(
            Entry("attention", case, mode, what, ("fused", "sdpa"), "", MEMORY, at_least=130)
        )
    entries.append(_attention(base, "fwd_bwd", "fp16", False, 16, 18))
    entries += [
        _attention(base, "fwd", "fp32", False, 1.15, 1.3, isa="avx2"),
        _attention(base, "fwd", "fp32", True, 1.4, 1.6, isa="avx2"),
    ]
    small, large = (rows.Case(64, 64), rows.Case(128, 128))
    if not quick:
        small, large = rows.Case(4096, 512), rows.Case(16384, 4096)
    entries += [
        _norm(small, "fwd", "fp32", 19, 22),
        _norm(small, "fwd", "bf16", 38, 45),
        _norm(small, "fwd_bwd", "fp32", 6.5, 8),
        _norm(small, "fwd_bwd", "bf16", 18, 22),
        _norm(large, "fwd", "fp32", 6.5, 9),
        _norm(large, "fwd_bwd", "fp32", 2.8, 3.5),
    ]
    for mode, at_least in (("fwd", 1.0), ("fwd_bwd", None)):
        what = f"attention, fp32, N = 16, {MODE_NAMES[mode]}: one call"
        impls = ("fused", "sdpa", "plain")
        entries.append(
            Entry("attention", base.at(seq=16), mode, what, impls, "", OVERHEAD, at_least)
        )
    # Goals are for the full sizes.
    return [changed(entry, at_least=None, aim=None) for entry in entries] if quick else entries


def _attention(
    base: attention.Case, mode: str, dtype: str, causal: bool, at_least: float, aim: float, isa=""
) -> Entry:
    case = base.at(dtype=dtype, causal=causal)
    title = f"attention, {dtype}, {'causal' if causal else 'full'}"
    title += f", dropout {case.dropout_p:g}" if case.dropout_p else ""
    title += f", held to {isa.upper()}" if isa else ""
    impls = _CPU_ATTENTION[:3] if isa else _CPU_ATTENTION
    return Entry(
        "attention", case, mode, f"{title}: {MODE_NAMES[mode]}", impls,
        at_least=at_least, aim=aim, isa=isa,
    )  # fmt: skip


def _norm(size: rows.Case, mode: str, dtype: str, at_least: float, aim: float) -> Entry:
    case = size.at(dtype=dtype, dropout_p=0.1)
    title = f"dropout_add_layer_norm, {dtype}, {case.rows} x {case.width}: {MODE_NAMES[mode]}"
    return Entry("dropout_add_layer_norm", case, mode, title, at_least=at_least, aim=aim)


# name -> (quick, device) -> entries
SUITES: dict[str, Callable[..., list[Entry]]] = {"cpu": cpu}


def sample(op: str, device: str) -> Any:
    """A small problem of an op, in a dtype that every implementation takes."""
    kind = OPS[op].case
    if kind is attention.Case:
        return attention.Case(1, 2, 128, 64, "bf16", device=device)
    if kind is rows.Case:
        return rows.Case(32, 128, "bf16", device=device)
    return kind(rows=32, vocab=1024, hidden=128, dtype="bf16", device=device)
