"""What GPUs are held to: the suite `gpu` of the kernels, Triton's and CUDA C++'s, and models.

The goals are for one H200. Every goal is one of an entry, so that a result file says of each
whether it was reached. What matters most comes first: a budget may end before the suite does.
"""

from fusedformer.benchmarks import op_suites
from fusedformer.benchmarks.entries import (
    BEST,
    COPY,
    LINEAR,
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
from fusedformer.benchmarks.ops import attention, cross_entropy, models, rows

_OURS = ("fused-triton", "fused-cuda")
_TORCH = ("sdpa", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient")
_PEERS = ("flash-attn-2", "flash-attn-3", "flash-attn-4", "xformers", "transformer-engine")
_EVERYONE = (*_OURS, *_TORCH, *_PEERS, "flex", "compile")

# 32k tokens; heads times head dimension are 2048.
_TOKENS, _FEATURES = 32768, 2048


def suite(quick: bool, device: str) -> list[Entry]:
    """The entries; quick ones are shorter, fewer and without goals. On a CPU all are tiny."""
    scale = 16 if device == "cpu" else 1
    entries = [
        *_attention(quick, device, scale),
        *_rows(quick, device, scale),
        *_losses(quick, device, scale),
        *_small(device),
        *_longest(quick, device, scale),
        *([] if quick else _attention_in_full(device, scale)),
        *([] if quick else _attention_of_other_kinds(device, scale)),
        *([] if quick else _other_ops(device, scale)),
    ]
    reduced = quick or device == "cpu"
    return [entry.at(goals=()) if reduced else entry for entry in entries]


def _triton(kind: str, at_least: "float | None", aim: "float | None" = None) -> Goal:
    return Goal(kind, at_least, aim, "fused-triton")


def _cuda(kind: str, at_least: "float | None", aim: "float | None" = None) -> Goal:
    return Goal(kind, at_least, aim, "fused-cuda")


def _case(device: str, scale: int, seq: int, dim: int, causal: bool = True) -> attention.Case:
    seq //= scale
    batch, heads = max(1, _TOKENS // scale // seq), max(1, _FEATURES // scale // dim)
    return attention.Case(batch, heads, seq, dim, "bf16", causal, device=device)


def _beside_cudnn(case: attention.Case, mode: str, *goals: Goal) -> Entry:
    impls = _EVERYONE if case.head_dim == 128 else (*_OURS, *_TORCH)
    return Entry("attention", case, mode, "", impls, "sdpa-cudnn", goals=goals)


def _with_dropout(plain: attention.Case, *goals: Goal) -> list[Entry]:
    """With dropout against torch's own, and the same without for our price of it."""
    impls = (*_OURS, *_TORCH)
    return [
        Entry("attention", plain, "fwd_bwd", "", impls),
        Entry("attention", plain.at(dropout_p=0.1), "fwd_bwd", "", impls, goals=goals),
    ]


_D128 = (
    _triton(RATIO, 1.25, 1.4),
    _triton(OWN, 0.80, 0.88),
    _cuda(RATIO, 1.6, 1.8),
    _cuda(OWN, 0.85, 0.90),
)
_D64 = (
    _triton(RATIO, 1.25, 1.4),
    _triton(OWN, 0.68, 0.78),
    _cuda(RATIO, 1.4, 1.6),
    _cuda(OWN, 0.70, 0.80),
)


def _attention(quick: bool, device: str, scale: int) -> list[Entry]:
    """Causal, of 8k tokens."""
    scale *= 4 if quick else 1
    d128, d64 = (_case(device, scale, 8192, dim) for dim in (128, 64))
    forward = (_triton(TFLOPS, 420, 480), _cuda(RATIO, 1.0, 1.05), _cuda(TFLOPS, None, 700))
    return [
        _beside_cudnn(d128, "fwd", *forward),
        _beside_cudnn(d128, "bwd", _triton(TFLOPS, 320, 400), _cuda(RATIO, 0.95, 1.05)),
        *_with_dropout(d128, *_D128),
        *_with_dropout(d64, *_D64),
    ]


def _attention_in_full(device: str, scale: int) -> list[Entry]:
    """Head dimension 64; 16k tokens, causal and not; dropout without a causal mask."""
    d64, long = _case(device, scale, 8192, 64), _case(device, scale, 16384, 128)
    best, full = _cuda(BEST, 1.0, 1.05), long.at(causal=False)
    return [
        _beside_cudnn(d64, "fwd", best),
        _beside_cudnn(d64, "bwd", best),
        _beside_cudnn(long, "fwd", _cuda(RATIO, 1.0, 1.05), _cuda(TFLOPS, None, 700)),
        _beside_cudnn(long, "bwd", _cuda(RATIO, 0.95, 1.05)),
        _beside_cudnn(full, "fwd", _cuda(RATIO, 0.97, 1.03)),
        _beside_cudnn(full, "bwd", _cuda(RATIO, 0.97, 1.03)),
        *_with_dropout(_case(device, scale, 8192, 128, causal=False), *_D128),
        *_with_dropout(_case(device, scale, 8192, 64, causal=False), *_D64),
    ]


def _attention_of_other_kinds(device: str, scale: int) -> list[Entry]:
    """Causal, of 4k tokens, forward with backward: other head dimensions and dtypes, grouped heads,
    sequences of unequal lengths."""
    base = _case(device, scale, 4096, 128)
    cases = [_case(device, scale, 4096, dim) for dim in (32, 96, 192, 256)]
    cases += [base.at(dtype="fp16"), base.at(dtype="fp32")]
    cases += [base.at(kv_heads=max(1, base.heads // 4)), base.at(padded=True)]
    impls = (*_OURS, *_TORCH)
    return [Entry("attention", case, "fwd_bwd", "", impls) for case in cases]


def _other_ops(device: str, scale: int) -> list[Entry]:
    """The other ops on rows, forward with backward; and one small call of each."""
    wide = rows.Case(2**15 // scale**2, 4096, "bf16", 0.1, device)
    ops = {"layer_norm": 0.0, "rms_norm": 0.0, "dropout": 0.1, "bias_activation": 0.1}
    return [
        *(Entry(op, wide.at(dropout_p=p), "fwd_bwd") for op, p in ops.items()),
        *(entry for entry in op_suites.overhead_suite(False, device) if entry.op != "attention"),
    ]


def _rows(quick: bool, device: str, scale: int) -> list[Entry]:
    """Dropout + add + layer norm over widths, in shares of the copy bandwidth."""
    entries = []
    widths = (1024, 4096) if quick else (768, 1024, 2048, 4096, 8192, 16384)
    for width in widths:
        size = rows.Case(2**27 // width // scale**2, width, "bf16", 0.1, device)
        forward = Goal(COPY, 0.75, 0.80) if width == 768 else Goal(COPY, 0.88, 0.92)
        backward = [Goal(COPY, 0.75, 0.85)] if 1024 <= width <= 8192 else []
        for mode, copy in (("fwd", [forward]), ("bwd", backward)):
            goals = (*copy, Goal(RATIO, 1.0, 1.1))
            entries.append(
                Entry("dropout_add_layer_norm", size, mode, "", (), "compile", goals=goals)
            )
    return entries


def _losses(quick: bool, device: str, scale: int) -> list[Entry]:
    """Cross-entropy, and with the linear layer before it: time and workspace."""
    entries = []
    for vocab in (32768,) if quick else (32768, 131072):
        case = cross_entropy.Case(2**29 // vocab // scale**2, vocab, 0, "bf16", device)
        entries += [
            Entry("cross_entropy", case, "fwd", goals=(Goal(COPY, 0.88, 0.92),)),
            Entry("cross_entropy", case, "fwd_bwd", goals=(Goal(COPY, 0.60, 0.65),)),
        ]
    tokens, vocab = _TOKENS // scale**2 // (4 if quick else 1), 131072 // scale
    case = cross_entropy.Case(tokens, vocab, _FEATURES // scale, "bf16", device)
    time, space = (Goal(RATIO, 1 / 1.15, 1 / 1.05),), (Goal(RATIO, 8, 12),)
    impls = ("fused", "eager", "compile")
    entries.append(Entry("linear_cross_entropy", case, "fwd_bwd", "", (), "compile", goals=time))
    entries.append(
        Entry("linear_cross_entropy", case, "fwd_bwd", "", impls, "compile", WORKSPACE, space)
    )
    return entries


def _small(device: str) -> list[Entry]:
    """How long an eager call keeps the calling thread."""
    small = attention.Case(1, 8, 128, 64, "bf16", device=device)
    return [
        Entry(
            "attention", small, mode, "", ("fused", *_OURS, "sdpa"), "", OVERHEAD,
            (Goal(MICROSECONDS, *at_most),),
        )
        for mode, at_most in (("fwd", (22, 15)), ("fwd_grad", (30, 22)))
    ]  # fmt: skip


def _longest(quick: bool, device: str, scale: int) -> list[Entry]:
    """64k tokens in one sequence: that it runs, and in memory that grows as the length does."""
    seq = 65536 // scale**2 // (4 if quick else 1)
    longest = attention.Case(1, 16, seq, 128, "bf16", True, 0.1, device)
    impls = (*_OURS, "sdpa")
    linear = (_triton(LINEAR, 2.1), _cuda(LINEAR, 2.1))
    return [
        Entry("attention", longest, "fwd_bwd", "", impls),
        Entry("attention", longest.at(seq=seq // 2), "fwd_bwd", "", impls, "", MEMORY),
        Entry("attention", longest, "fwd_bwd", "", impls, "", MEMORY, linear),
    ]


# Model-FLOP utilisation (see transformer/train_flops.py) is against the 989 TFLOP/s of dense
# bfloat16 that NVIDIA publishes for H100 and H200, as others' figures are.
_PUBLISHED = 989.0


def trained(quick: bool, device: str) -> list[Entry]:
    """Training steps, dropout and all, each with and without torch.compile; then decoding."""
    sizes = models.sizes(quick or device == "cpu", device)
    (base,), (gpt2,), (decoded,) = (
        sizes[op] for op in ("transformer_step", "gpt_training", "gpt_decode")
    )
    utilisation = Goal(TFLOPS, 0.41 * _PUBLISHED, 0.46 * _PUBLISHED, "fused-compile")
    ratio = Goal(RATIO, 1.3, 1.5, "fused-compile")
    entries = [
        Entry("gpt_training", gpt2, models.STEP, baseline="compile", goals=(utilisation,)),
        Entry("transformer_step", base, models.STEP, baseline="compile", goals=(ratio,)),
        Entry("gpt_decode", decoded, models.STEP),
    ]
    reduced = quick or device == "cpu"
    return [entry.at(goals=()) if reduced else entry for entry in entries]
