"""The named suites of `fusedformer bench`. Each takes (quick, device) and gives entries."""

from collections.abc import Callable

from fusedformer.benchmarks import gpu_suite, op_suites
from fusedformer.benchmarks.entries import MEMORY, OVERHEAD, RATIO, TIME, Entry, Goal
from fusedformer.benchmarks.ops import attention, models, rows

Suite = Callable[[bool, str], list[Entry]]


# --- The goals of the C++ kernels -----------------------------------------------------------------

_CPU_ATTENTION = ("fused", "sdpa", "plain", "compile")


def cpu(quick: bool, device: str) -> list[Entry]:
    """What the C++ kernels are held to, each beside PyTorch; one batch of 8 heads of 64."""
    if device != "cpu":
        raise ValueError(f"--suite cpu is for a CPU; --device is {device!r}")
    base = attention.Case(1, 8, 256 if quick else 4096, 64)
    dropped = base.at(dropout_p=0.1)
    entries = [
        *_attention(base, "fwd", "bf16", ((4.3, 5.0), (4.8, 5.6))),
        *_attention(base, "fwd", "fp32", ((2.3, 2.6), (2.5, 2.9))),
        *_attention(base, "fwd_bwd", "bf16", ((3.4, 4.0), (3.6, 4.3))),
        *_attention(base, "fwd_bwd", "fp32", ((2.3, 2.6), (2.6, 3.0))),
        *_attention(dropped, "fwd", "bf16", ((33, 40),)),
        *_attention(dropped, "fwd_bwd", "bf16", ((16, 19),)),
        *_attention(dropped, "fwd", "fp32", ((18, 21),)),
        *_attention(dropped, "fwd_bwd", "fp32", ((8.3, 9.5),)),
        *_attention(base, "fwd_bwd", "fp16", ((16, 18),)),
        *_attention(base, "fwd", "fp32", ((1.15, 1.3), (1.4, 1.6)), "avx2"),
    ]
    for mode in ("fwd", "fwd_bwd"):
        case = dropped.at(seq=512 if quick else 8192, dtype="bf16")
        goals = (Goal(RATIO, 130),)
        entries.append(Entry("attention", case, mode, "", ("fused", "sdpa"), "", MEMORY, goals))
    small, large = rows.Case(4096, 512), rows.Case(16384, 4096)
    if quick:
        small, large = rows.Case(64, 64), rows.Case(128, 128)
    entries += [
        _norm(small, "fwd", "fp32", 19, 22),
        _norm(small, "fwd", "bf16", 38, 45),
        _norm(small, "fwd_bwd", "fp32", 6.5, 8),
        _norm(small, "fwd_bwd", "bf16", 18, 22),
        _norm(large, "fwd", "fp32", 6.5, 9),
        _norm(large, "fwd_bwd", "fp32", 2.8, 3.5),
    ]
    overhead = {"fwd": (Goal(RATIO, 1.0),), "fwd_grad": (), "fwd_bwd": ()}
    entries += [
        Entry(
            "attention", base.at(seq=16), mode, "", ("fused", "sdpa", "plain"), "", OVERHEAD, goals
        )
        for mode, goals in overhead.items()
    ]
    return [entry.at(goals=()) if quick else entry for entry in entries]  # of the full sizes


def _attention(
    base: attention.Case,
    mode: str,
    dtype: str,
    goals: "tuple[tuple[float, float], ...]",
    isa: str = "",
) -> list[Entry]:
    """Full, and where there is a second goal causal."""
    impls = _CPU_ATTENTION[:3] if isa else _CPU_ATTENTION
    return [
        Entry(
            "attention", base.at(dtype=dtype, causal=causal), mode, "", impls,
            goals=(Goal(RATIO, *goal),), isa=isa,
        )
        for causal, goal in zip((False, True), goals, strict=False)
    ]  # fmt: skip


def _norm(size: rows.Case, mode: str, dtype: str, at_least: float, aim: float) -> Entry:
    case = size.at(dtype=dtype, dropout_p=0.1)
    return Entry("dropout_add_layer_norm", case, mode, goals=(Goal(RATIO, at_least, aim),))


# --- The goals of whole models on a CPU -----------------------------------------------------------


def cpu_models(quick: bool, device: str) -> list[Entry]:
    """What training steps and decoding on a CPU are held to; dropout 0.1, the papers' sizes."""
    if device != "cpu":
        raise ValueError(f"--suite cpu-models is for a CPU; --device is {device!r}")
    base = models.Case(1, 512, 6, 512, 8, 37000)
    gpt2 = models.Case(1, 1024, 12, 768, 12, 50257)
    if quick:
        base = gpt2 = models.Case(1, 16, 1, 32, 2, 64)
    long, decoded = (16, 8) if quick else (2048, 256)

    def held(op: str, case: models.Case, at_least: float, title: str, quantity: str) -> Entry:
        theirs = "no-cache" if op == "gpt_decode" else "torch"
        title = "" if quick else f"{title}, {case.dtype}"  # other sizes are not those models
        goals = () if quick else (Goal(RATIO, at_least),)
        return Entry(op, case, models.STEP, title, ("fused", theirs), "", quantity, goals)

    entries = []
    for dtype, at_512, at_1024, gpt in (("fp32", 1.6, 2.5, 1.6), ("bf16", 3, 5, 3)):
        for case, goal in ((base, at_512), (base.at(seq=2 * base.seq), at_1024)):
            title = f"Transformer-base, training step, N = {case.seq}"
            entries.append(held("transformer_step", case.at(dtype=dtype), goal, title, TIME))
        title = f"GPT-2 small, forward+backward, N = {gpt2.seq}"
        entries.append(held("gpt_step", gpt2.at(dtype=dtype), gpt, title, TIME))
        title = f"Transformer-base, training step, memory, N = {long}"
        case = base.at(seq=long, dtype=dtype)
        entries.append(held("transformer_step", case, 3, title, MEMORY))
    for dtype in ("fp32", "bf16"):
        title = f"GPT-2 small, {decoded} tokens decoded"
        entries.append(held("gpt_decode", gpt2.at(seq=decoded, dtype=dtype), 10, title, TIME))
    return entries


SUITES: dict[str, Suite] = {
    "cpu": cpu,
    "cpu-models": cpu_models,
    "gpu": gpu_suite.suite,
    "attention": op_suites.attention_suite,
    "rows": op_suites.rows_suite,
    "losses": op_suites.losses_suite,
    "models": op_suites.models_suite,
    "overhead": op_suites.overhead_suite,
    "memory": op_suites.memory_suite,
}
