"""Suites over sizes: each op over the sizes that its cost depends on, without goals."""

import itertools

from fusedformer.benchmarks.entries import MEMORY, OVERHEAD, WORKSPACE, Entry
from fusedformer.benchmarks.ops import attention, cross_entropy, models, rows


def _lengths(quick: bool, device: str) -> tuple[int, ...]:
    if quick:
        return (128, 256)
    return (1024, 2048, 4096, 8192, 16384) if device == "cuda" else (512, 1024, 2048, 4096)


def _base(quick: bool, device: str, seq: int, dim: int = 64) -> attention.Case:
    """As many tokens at every length, on a GPU; on a CPU one sequence."""
    if device == "cuda":
        return attention.Case(max(1, 16384 // seq), 2048 // dim, seq, dim, "bf16", device=device)
    return attention.Case(1, 2 if quick else 8, seq, dim, "fp32", device=device)


def attention_suite(quick: bool, device: str) -> list[Entry]:
    """Attention over lengths; then at one of them head dimensions, dtypes, grouped heads, padding.

    Forward, backward and both, full and causal, with and without dropout.
    """
    lengths = _lengths(quick, device)
    entries = [
        Entry("attention", _base(quick, device, n).at(causal=causal, dropout_p=p), mode)
        for causal, p, mode in itertools.product((False, True), (0.0, 0.1), ("fwd", "fwd_bwd"))
        for n in lengths
    ]
    middle = _base(quick, device, lengths[-2])
    entries += [Entry("attention", middle.at(causal=True), "bwd")]
    entries += [
        Entry("attention", _base(quick, device, lengths[-2], dim).at(causal=True), "fwd_bwd")
        for dim in (32, 96, 128, 256)
    ]
    others = {"fp32", "fp16", "bf16"} - {middle.dtype}
    entries += [
        Entry("attention", middle.at(causal=True, dtype=dtype), "fwd_bwd")
        for dtype in sorted(others)
    ]
    entries += [
        Entry("attention", middle.at(causal=True, kv_heads=middle.heads // 2), "fwd_bwd"),
        Entry("attention", middle.at(batch=4, padded=True), "fwd_bwd"),
    ]
    return entries


def rows_suite(quick: bool, device: str) -> list[Entry]:
    """The ops that memory bounds, over widths, forward and forward with backward."""
    widths: tuple[int, ...] = (64, 128) if quick else (512, 1024, 4096)
    elements = 2**12 if quick else 2**22
    if device == "cuda":
        widths, elements = (768, 1024, 2048, 4096, 8192, 16384), 2**27
    return [
        Entry(op, rows.Case(elements // width, width, dtype, p, device), mode)
        for op, p in (
            ("dropout_add_layer_norm", 0.1),
            ("dropout_add_layer_norm", 0.0),
            ("layer_norm", 0.0),
            ("rms_norm", 0.0),
            ("dropout", 0.1),
            ("bias_activation", 0.1),
        )
        for dtype in (("bf16",) if device == "cuda" else ("fp32", "bf16"))
        for mode in ("fwd", "fwd_bwd")
        for width in widths
    ]


def losses_suite(quick: bool, device: str) -> list[Entry]:
    """Cross-entropy over vocabularies, and with the linear layer before it: time and workspace."""
    gpu = device == "cuda"
    vocabularies = (512, 1024) if quick else (32768, 131072) if gpu else (8192, 32768)
    tokens, hidden, dtype = (64, 32, "fp32") if quick else (1024, 512, "fp32")
    if gpu:
        tokens, hidden, dtype = 16384, 2048, "bf16"
    entries = []
    for vocab in vocabularies:
        logits = cross_entropy.Case(tokens, vocab, 0, dtype, device)
        linear = cross_entropy.Case(tokens, vocab, hidden, dtype, device)
        entries += [Entry("cross_entropy", logits, mode) for mode in ("fwd", "fwd_bwd")]
        entries += [
            Entry("linear_cross_entropy", linear, "fwd_bwd"),
            Entry("linear_cross_entropy", linear, "fwd_bwd", quantity=WORKSPACE),
        ]
    return entries


def overhead_suite(quick: bool, device: str) -> list[Entry]:
    """One small call of each op: how long it keeps the calling thread."""
    dtype = "bf16" if device == "cuda" else "fp32"
    cases = {
        "attention": attention.Case(1, 8, 16, 64, dtype, device=device),
        "dropout_add_layer_norm": rows.Case(16, 64, dtype, 0.1, device),
        "layer_norm": rows.Case(16, 64, dtype, device=device),
        "dropout": rows.Case(16, 64, dtype, 0.1, device),
        "bias_activation": rows.Case(16, 64, dtype, 0.1, device),
        "cross_entropy": cross_entropy.Case(16, 64, 0, dtype, device),
    }
    return [
        Entry(op, case, mode, quantity=OVERHEAD)
        for op, case in cases.items()
        for mode in ("fwd", "fwd_grad", "fwd_bwd")
    ]


def memory_suite(quick: bool, device: str) -> list[Entry]:
    """The peak beyond the inputs of attention's forward with backward, over lengths."""
    lengths = _lengths(quick, device)
    return [
        Entry("attention", _base(quick, device, n).at(dropout_p=p), "fwd_bwd", quantity=MEMORY)
        for p in (0.0, 0.1)
        for n in (*lengths, 2 * lengths[-1])
    ]


def models_suite(quick: bool, device: str) -> list[Entry]:
    """Training steps of whole models, and decoding with and without a cache."""
    return [
        Entry(op, case, models.STEP)
        for op, cases in models.sizes(quick, device).items()
        for case in cases
    ]
