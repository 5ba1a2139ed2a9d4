"""The named suites of `fusedformer bench`. Each takes (quick, device) and gives entries."""

from collections.abc import Callable, Iterable

from fusedformer.benchmarks import op_suites
from fusedformer.benchmarks.entries import (
    COPY,
    MEMORY,
    MICROSECONDS,
    OVERHEAD,
    OWN,
    RATIO,
    TFLOPS,
    WORKSPACE,
    Entry,
    Goal,
)
from fusedformer.benchmarks.ops import attention, cross_entropy, rows

Suite = Callable[[bool, str], list[Entry]]


def _full_size_goals(entries: Iterable[Entry], quick: bool) -> list[Entry]:
    """Goals are for the full sizes."""
    return [entry.at(goals=()) if quick else entry for entry in entries]


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
    return _full_size_goals(entries, quick)


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


# --- The goals of the GPU kernels -----------------------------------------------------------------

_SDPA = ("fused", "sdpa", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient")
_PEERS = ("flash-attn-2", "flash-attn-3", "flash-attn-4", "xformers", "transformer-engine")


def gpu(quick: bool, device: str) -> list[Entry]:
    """What the GPU kernels are held to; 32k tokens, heads times head dimension 2048."""
    scale = 16 if device == "cpu" else 1
    long = 8192 // scale // (4 if quick else 1)

    def case(dim: int, causal: bool) -> attention.Case:
        batch, heads = max(1, 32768 // scale // long), max(1, 2048 // scale // dim)
        return attention.Case(batch, heads, long, dim, "bf16", causal, device=device)

    d128 = case(128, causal=True)
    impls = (*_SDPA, *_PEERS, "flex", "compile")
    entries = [
        Entry("attention", d128, "fwd", "", impls, goals=(Goal(TFLOPS, 420, 480),)),
        Entry("attention", d128, "bwd", "", impls, goals=(Goal(TFLOPS, 320, 400),)),
    ]
    # Dropout, against torch and against our own without it.
    for dim, own in ((128, Goal(OWN, 0.80, 0.88)), (64, Goal(OWN, 0.68, 0.78))):
        for causal in (True, False):
            plain = case(dim, causal)
            dropped = plain.at(dropout_p=0.1)
            goals = (Goal(RATIO, 1.25, 1.4), own)
            entries += [
                Entry("attention", plain, "fwd_bwd", "", _SDPA),
                Entry("attention", dropped, "fwd_bwd", "", _SDPA, goals=goals),
            ]
    entries += _gpu_rows(quick, device, scale)
    entries += _gpu_losses(device, scale)
    small = attention.Case(1, 8, 128, 64, "bf16", device=device)
    for mode, at_most in (("fwd", (22, 15)), ("fwd_grad", (30, 22))):
        entry = Entry("attention", small, mode, "", ("fused", "sdpa"), "", OVERHEAD)
        entries.append(entry.at(goals=(Goal(MICROSECONDS, *at_most),)))
    longest = attention.Case(1, 16, 65536 // scale**2, 128, "bf16", True, 0.1, device)
    entries.append(Entry("attention", longest, "fwd_bwd", "", ("fused", "sdpa")))
    return _full_size_goals(entries, quick or device == "cpu")


def _gpu_rows(quick: bool, device: str, scale: int) -> list[Entry]:
    entries = []
    widths = (1024, 4096) if quick else (768, 1024, 2048, 4096, 8192, 16384)
    for width in widths:
        size = rows.Case(2**27 // width // scale**2, width, "bf16", 0.1, device)
        forward = Goal(COPY, 0.75, 0.80) if width == 768 else Goal(COPY, 0.88, 0.92)
        backward = [Goal(COPY, 0.75, 0.85)] if 1024 <= width <= 8192 else []
        for mode, copy in (("fwd", [forward]), ("bwd", backward)):
            wanted = (*copy, Goal(RATIO, 1.0, 1.1))
            entries.append(
                Entry("dropout_add_layer_norm", size, mode, "", (), "compile", goals=wanted)
            )
    return entries


def _gpu_losses(device: str, scale: int) -> list[Entry]:
    entries = []
    for vocab in (32768, 131072):
        case = cross_entropy.Case(2**29 // vocab // scale**2, vocab, 0, "bf16", device)
        entries += [
            Entry("cross_entropy", case, "fwd", goals=(Goal(COPY, 0.88, 0.92),)),
            Entry("cross_entropy", case, "fwd_bwd", goals=(Goal(COPY, 0.60, 0.65),)),
        ]
    case = cross_entropy.Case(32768 // scale**2, 131072 // scale, 2048 // scale, "bf16", device)
    entries += [
        Entry(
            "linear_cross_entropy", case, "fwd_bwd", "", (), "compile",
            goals=(Goal(RATIO, 1 / 1.15, 1 / 1.05),),
        ),
        Entry(
            "linear_cross_entropy", case, "fwd_bwd", "", ("fused", "eager", "compile"), "compile",
            WORKSPACE, (Goal(RATIO, 8, 12),),
        ),
    ]  # fmt: skip
    return entries


SUITES: dict[str, Suite] = {
    "cpu": cpu,
    "gpu": gpu,
    "attention": op_suites.attention_suite,
    "rows": op_suites.rows_suite,
    "losses": op_suites.losses_suite,
    "models": op_suites.models_suite,
    "overhead": op_suites.overhead_suite,
    "memory": op_suites.memory_suite,
}
