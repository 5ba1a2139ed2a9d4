"""What ``tune`` measures: branches of the launchers' choices, and the candidates of each.

A branch is one launch of one problem. Its candidates are what the launcher's own choice may be
replaced by: whatever that function returns.
"""

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Tokens times features of an attention problem: enough waves of programs to rank by.
_TOKENS, _FEATURES, _SEQ = 16384, 2048, 4096
_ELEMENTS = 2**26  # of the problems on rows

# More float32 accumulators a thread than this spill, whatever else a kernel holds. Specialized
# warps come with as many again, which share them.
_MOST_ACCUMULATORS = 192

# A call of launchers on inputs that a maker of one has made; returns its outputs.
Call = Callable[[], "tuple[Tensor | None, ...]"]


@dataclass(frozen=True)
class Branch:
    """A branch of the function ``chooser`` of a module of kernels/triton."""

    name: str
    module: str
    chooser: str
    kernels: tuple[str, ...]  # the launch in question is of one of these
    candidates: tuple[Any, ...]
    make: Callable[[str], Call]  # of inputs on a device: "cuda" or "meta"
    operations: float = 0.0  # floating-point operations of its matrix products
    before: tuple[str, ...] = ()  # kernels whose results the launch reads
    after: tuple[str, ...] = ()  # kernels that read its results

    def backend(self) -> Any:
        """The module, imported when it is needed: not every machine has Triton."""
        return importlib.import_module(f"fusedformer.kernels.triton.{self.module}")


@contextmanager
def choosing(branch: Branch, candidate: Any) -> Iterator[None]:
    """Within the block, the launcher chooses this candidate; None is its own choice."""
    backend = branch.backend()
    before = getattr(backend, branch.chooser)
    if candidate is not None:
        setattr(backend, branch.chooser, lambda *args, **options: candidate)
    try:
        yield
    finally:
        setattr(backend, branch.chooser, before)


def launches(
    branch: Branch, candidate: Any, call: Call, chip: Any
) -> "tuple[list, list, list, tuple]":
    """What the launch reads from, the launch itself, and what comes of it; not run.

    Returns:
        (recorded launches of ``before``, ``kernels`` and ``after``, and of the call's outputs those
        that the last two write).
    """
    from fusedformer.kernels.triton import launch

    with choosing(branch, candidate), launch.recording(chip) as recorded:
        outputs = call()
    before, own, after = (
        [entry for entry in recorded if entry.kernel.__name__ in names]
        for names in (branch.before, branch.kernels, branch.after)
    )
    written = tuple(
        out
        for out in outputs
        if out is not None and any(out is given for entry in own + after for given in entry.args)
    )
    return before, own, after, written


def described(candidate: Any) -> dict:
    """A candidate as JSON has it."""
    return dict(candidate) if isinstance(candidate, dict) else dataclasses.asdict(candidate)


def _random(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=dtype, device=device)


def _seed(device: str) -> Tensor:
    return torch.full((), 1234, dtype=torch.int64, device=device)


# --- Attention ------------------------------------------------------------------------------------

_ATTENTION = {
    "forward": ("forward_config", "attention_fwd_kernel", 2),
    "dK and dV": ("key_value_grads_config", "attention_key_value_grads_kernel", 4),
    "dQ": ("query_grads_config", "attention_query_grads_kernel", 3),
}


def _attention_calls(
    dim: int, causal: bool, p: float, masked: bool, backward: bool, device: str
) -> Callable[[], tuple]:
    from fusedformer.kernels.triton import attention as backend

    size = (_TOKENS // _SEQ, _FEATURES // dim // 2 * 2, _SEQ, dim)
    # (B, N, H, D) in memory, as projections give it.
    query, key, value, grad_out = (
        _random(device, size[0], _SEQ, size[1], dim).transpose(1, 2) for _ in range(4)
    )
    seed = _seed(device) if p else None
    mask = _random(device, size[0], 1, _SEQ, _SEQ) > 0 if masked else None
    diagonal = 0 if causal else None
    args = (query, key, value, mask, None, seed, diagonal, dim**-0.5, p, [0, 0, 0, 0])
    if not backward:
        return lambda: backend.attention_fwd(*args)
    out, lse = backend.attention_fwd(*args)
    return lambda: backend.attention_bwd(grad_out, None, out, lse, *args, False)


def _accumulators(part: str, m: int, n: int, dim: int) -> int:
    """Elements of the float32 tiles that a program holds at once."""
    if part == "forward":
        return m * n + m * dim
    return 2 * m * n + (2 * n * dim if part == "dK and dV" else m * dim)


def _attention_candidates(part: str, dim: int) -> Iterator[Any]:
    from fusedformer.kernels.triton.attention import Config, block_dim

    tiles = [(64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)]
    if part == "dK and dV":
        tiles = [(n, m) for m, n in tiles]  # it is the keys' side that takes 64 or more
    for (m, n), stages, descriptors in itertools.product(tiles, (2, 3), (False, True)):
        # 64 rows of queries are one warpgroup's.
        for warps in (4, 8) if part == "dK and dV" or m == 128 else (4,):
            held = _accumulators(part, m, n, block_dim(dim)) / (32 * warps)
            if 32 <= held <= _MOST_ACCUMULATORS:
                yield Config(m, n, warps, stages, descriptors)
        held = _accumulators(part, m, n, block_dim(dim)) / (32 * 8)
        if descriptors and part != "dQ" and held <= _MOST_ACCUMULATORS:
            yield Config(m, n, 4, stages, True, True)


def _attention(part: str, dim: int, causal: bool, p: float, masked: bool = False) -> Branch:
    chooser, kernel, products = _ATTENTION[part]
    visited = _TOKENS * _SEQ * (_FEATURES // dim // 2 * 2) / (2 if causal else 1)
    kind = "masked" if masked else "causal" if causal else "full"
    candidates = _attention_candidates(part, dim)
    return Branch(
        f"attention {part}, d = {dim}, {kind}, p = {p:g}", "attention", chooser, (kernel,),
        # Warps are specialized without a mask alone.
        tuple(held for held in candidates if not (masked and held.specialized)),
        lambda device: _attention_calls(dim, causal, p, masked, part != "forward", device),
        2.0 * products * visited * dim,
        () if part == "forward" else ("attention_shift_kernel",),
    )  # fmt: skip


# --- Rows -----------------------------------------------------------------------------------------


def _norm_calls(width: int, backward: bool, device: str) -> Callable[[], tuple]:
    from fusedformer.kernels.triton import layer_norm as backend

    x, residual, grad = (_random(device, _ELEMENTS // width, width) for _ in range(3))
    weight = _random(device, width, dtype=torch.float32)
    seed = _seed(device)
    given = (x, residual, weight, weight, seed, 0.1, 1e-5, False, False, x.dtype)
    if not backward:
        return lambda: backend.dropout_add_layer_norm_fwd(*given)
    _, _, mean, rstd = backend.dropout_add_layer_norm_fwd(*given)
    return lambda: backend.dropout_add_layer_norm_bwd(
        grad, None, x, residual, weight, weight, seed, mean, rstd, 0.1, False, False, x.dtype,
        True, True, True,
    )  # fmt: skip


def _norm_candidates(width: int, backward: bool) -> Iterator[Any]:
    from fusedformer.kernels.triton.launch import power_of_2
    from fusedformer.kernels.triton.layer_norm import Config

    columns = power_of_2(width)
    for rows, warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16)):
        if not 4 <= rows * columns / (32 * warps) <= 32:  # elements a thread
            continue
        if backward:
            yield Config(rows, columns, warps, False, 1)
            yield Config(rows, columns, warps, False, 2)
        elif 256 * warps <= columns:
            yield Config(rows, 256 * warps, warps, False)
    for block, warps in ((1024, 8), (1024, 16), (2048, 8), (2048, 16), (4096, 8), (4096, 16)):
        if block < columns and columns >= 8192:
            yield Config(4 if backward else 1, block, warps, True)


def _norm(width: int, backward: bool) -> Branch:
    part, side = ("backward", "bwd") if backward else ("forward", "fwd")
    return Branch(
        f"dropout + add + layer norm {part}, width {width}",
        "layer_norm", f"{part}_config",
        (f"layer_norm_{side}_kernel", f"layer_norm_wide_{side}_kernel"),
        tuple(_norm_candidates(width, backward)),
        lambda device: _norm_calls(width, backward, device),
        # How many rows of sums there are is the candidate's; what they add up to is not.
        after=("layer_norm_weight_grads_kernel",) if backward else (),
    )  # fmt: skip


def _loss_calls(classes: int, backward: bool, device: str) -> Callable[[], tuple]:
    from fusedformer.kernels.triton import cross_entropy as backend

    logits = _random(device, 8 * _ELEMENTS // classes, classes)
    target = torch.zeros(logits.shape[0], dtype=torch.int64, device=device)
    losses, _, lse = backend.cross_entropy_fwd(logits, target, None, -100, 0.0)
    if not backward:
        return lambda: backend.cross_entropy_fwd(logits, target, None, -100, 0.0)
    return lambda: (backend.cross_entropy_bwd(losses, lse, logits, target, None, -100, 0.0),)


def _loss(classes: int, backward: bool) -> Branch:
    part, side = ("backward", "bwd") if backward else ("forward", "fwd")
    sizes = itertools.product((2048, 4096, 8192, 16384), (4, 8, 16))
    return Branch(
        f"cross-entropy {part}, {classes} classes",
        "cross_entropy", "_wide_grad_block" if backward else "_wide_block",
        (f"cross_entropy_wide_{side}_kernel",),
        tuple(
            {"COLUMNS": columns, "num_warps": warps} | ({"PIECE": 512} if backward else {})
            for columns, warps in sizes
            if 8 <= columns / (32 * warps) <= 64
        ),
        lambda device: _loss_calls(classes, backward, device),
    )  # fmt: skip


# --- All ------------------------------------------------------------------------------------------


def branches() -> list[Branch]:
    """All of them, what matters most first."""
    found = []
    for dim, causal, p in (
        (128, True, 0.0), (128, True, 0.1), (64, True, 0.1), (64, True, 0.0),
    ):  # fmt: skip
        found += [_attention(part, dim, causal, p) for part in _ATTENTION]
    found += [_norm(width, False) for width in (1024, 4096, 8192, 768, 16384)]
    found += [_norm(width, True) for width in (1024, 4096, 8192, 768)]
    found += [_loss(n, backward) for n in (32768, 131072) for backward in (False, True)]
    for dim, causal, p in (
        (128, False, 0.1), (64, False, 0.1), (128, False, 0.0), (64, False, 0.0),
        (96, True, 0.1), (256, True, 0.1), (192, True, 0.1), (32, True, 0.1),
        (96, True, 0.0), (256, True, 0.0), (192, True, 0.0), (32, True, 0.0),
    ):  # fmt: skip
        found += [_attention(part, dim, causal, p) for part in _ATTENTION]
    for dim in (64, 128):
        found += [_attention(part, dim, False, 0.1, masked=True) for part in _ATTENTION]
    return found
