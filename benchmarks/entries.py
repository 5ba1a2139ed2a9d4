"""What a suite is made of: a problem, a mode, who takes part, and what is aimed at."""

from dataclasses import dataclass, replace
from typing import Any

from fusedformer.benchmarks.ops import attention, cross_entropy, models, rows
from fusedformer.benchmarks.ops.registry import OPS

# What an entry measures: time; the peak of memory beyond the inputs, or beyond these and what is
# returned; the time of the calling thread.
TIME, MEMORY, WORKSPACE, OVERHEAD = "time", "memory", "workspace", "overhead"

MODE_NAMES = {
    "fwd": "forward",
    "fwd_grad": "forward with gradients",
    "bwd": "backward",
    "fwd_bwd": "forward+backward",
    models.STEP: "whole",
}

# Kinds of goals, all of this project's row: the baseline's cost over its cost; the same of the
# fastest backend of torch's SDPA; its TFLOP/s; its GB/s as a share of those of a large copy,
# measured in the same run; its speed as a share of that without dropout. Of the last two it is to
# be at most so many: its microseconds; its memory in units of that at half the length.
RATIO, BEST, TFLOPS, COPY, OWN = "ratio", "best", "tflops", "copy", "own"
MICROSECONDS, LINEAR = "microseconds", "linear"
AT_MOST = (MICROSECONDS, LINEAR)


@dataclass(frozen=True)
class Goal:
    """What is wanted of an implementation at least, and what is aimed at; of AT_MOST, at most."""

    kind: str
    at_least: float | None
    aim: float | None = None
    impl: str = "fused"


@dataclass(frozen=True)
class Entry:
    """One problem in one mode, measured for several implementations.

    Args:
        op: its name.
        case: the problem.
        mode: one of common.MODES.
        title: how tables call it; "" makes one of the problem.
        impls: names of the op's implementations; empty for all.
        baseline: what ratios are taken against; "" for default_baseline().
        quantity: TIME, MEMORY, WORKSPACE or OVERHEAD.
        isa: the instruction set that a CPU is held to, on both sides; "" for its best.
    """

    op: str
    case: Any
    mode: str
    title: str = ""
    impls: tuple[str, ...] = ()
    baseline: str = ""
    quantity: str = TIME
    goals: tuple[Goal, ...] = ()
    isa: str = ""

    def at(self, **changes: Any) -> "Entry":
        """This entry with some fields changed."""
        return replace(self, **changes)

    def key(self) -> str:
        """What tells it from every other entry, the same in every run."""
        fields = ",".join(f"{name}={value}" for name, value in self.case.as_dict().items())
        return "/".join(filter(None, (self.op, self.mode, self.quantity, fields, self.isa)))

    def named(self) -> str:
        """The title, or one made of the problem."""
        if self.title:
            return self.title
        what = f"{self.op}, {problem(self.case)}: {MODE_NAMES[self.mode]}"
        what += {TIME: "", OVERHEAD: ", one call"}.get(self.quantity, f", {self.quantity}")
        return what + (f", held to {self.isa.upper()}" if self.isa else "")


def default_baseline(op: str) -> str:
    """What an op's ratios are taken against: torch's SDPA, elsewhere eager PyTorch."""
    return "sdpa" if op == "attention" else OPS[op].eager


def problem(case: Any) -> str:
    """A problem in a few words, such as "bf16, N = 4096, d = 64, causal, dropout 0.1"."""
    parts = [case.dtype]
    if isinstance(case, attention.Case):
        parts.append(f"N = {case.seq}, d = {case.head_dim}")
        parts += [f"{case.kv_heads} heads of keys"] if case.group > 1 else []
        parts += ["causal"] * case.causal + ["padded"] * case.padded
    elif isinstance(case, rows.Case):
        parts.append(f"{case.rows} x {case.width}")
    elif isinstance(case, models.Case):
        parts.append(f"{case.layers} layers of {case.width}, {case.batch} x {case.seq} tokens")
        parts += [f"dropout {case.dropout:g}"] if case.dropout else []
    else:
        parts.append(f"{case.rows} tokens, {case.vocab} classes")
    parts += [f"dropout {case.dropout_p:g}"] if case.dropout_p else []
    return ", ".join(parts)


def sample(op: str, device: str) -> Any:
    """A small problem of an op, in a dtype that every implementation takes."""
    kind = OPS[op].case
    if kind is attention.Case:
        return attention.Case(1, 2, 128, 64, "bf16", device=device)
    if kind is rows.Case:
        return rows.Case(32, 128, "bf16", device=device)
    if kind is models.Case:
        return models.sizes(True, device)[op][0]
    return cross_entropy.Case(32, 1024, 128, "bf16", device)
