"""The implementations of attention that are compared, each as a forward and a backward call.

fused: this project's attention on the backend that its automatic choice takes here.
sdpa: torch.nn.functional.scaled_dot_product_attention.
plain: softmax(Q K^T / sqrt(d)) V written out in eager PyTorch.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fusedformer
from fusedformer.kernels import dispatch, rng

IMPLS = ("fused", "sdpa", "plain")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_SDP_BACKENDS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "overrideable"}


@dataclass(frozen=True)
class Case:
    """One attention problem: (batch, heads, seq, head_dim) queries, keys and values."""

    batch: int
    heads: int
    seq: int
    head_dim: int
    dtype: str = "fp32"
    causal: bool = False
    dropout_p: float = 0.0
    device: str = "cpu"

    def at(self, **changes: Any) -> "Case":
        """This case with some fields changed."""
        return replace(self, **changes)

    def as_dict(self) -> dict:
        """The fields, JSON-ready."""
        return asdict(self)


def inputs(case: Case, dtype: "torch.dtype | None" = None) -> list[Tensor]:
    """Random query, key, value (which require gradients) and output gradient, (B, H, N, D) each.

    The values are those of the case's dtype, held in ``dtype`` when that is given.
    """
    generator = torch.Generator(case.device).manual_seed(0)
    size = (case.batch, case.heads, case.seq, case.head_dim)
    own = DTYPES[case.dtype]
    tensors = [
        torch.randn(size, generator=generator, dtype=torch.float32, device=case.device)
        .to(own)
        .to(dtype or own)
        for _ in range(4)
    ]
    return [t.requires_grad_() for t in tensors[:3]] + tensors[3:]


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, dropout_p: float
) -> Tensor:
    """dropout(softmax(Q K^T / sqrt(d))) V, every step a tensor of its own; (B, H, N, D)."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return torch.nn.functional.dropout(scores.softmax(-1), dropout_p) @ value


def fused(query: Tensor, key: Tensor, value: Tensor, case: Case, **more: Any) -> Tensor:
    """fusedformer.attention with the case's options and ``more`` of its arguments."""
    out = fusedformer.attention(
        query, key, value, causal=case.causal, dropout_p=case.dropout_p, **more
    )
    assert isinstance(out, Tensor)  # a pair only with return_lse
    return out


def call(impl: str, case: Case, tensors: list[Tensor]) -> tuple[Callable, Callable]:
    """(forward, backward) of an implementation: backward takes what forward returned."""
    query, key, value, grad = tensors

    def forward() -> Tensor:
        if impl == "fused":
            return fused(query, key, value, case)
        if impl == "sdpa":
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, dropout_p=case.dropout_p, is_causal=case.causal
            )
        return plain_attention(query, key, value, case.causal, case.dropout_p)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (query, key, value), grad)

    return forward, backward


def backend(impl: str, case: Case, tensors: list[Tensor]) -> str:
    """The name of the backend that an implementation runs this case on."""
    query, key, value, _ = tensors
    if impl == "fused":
        return _fused_backend(case, query, key, value)
    if impl == "plain":
        return "eager"
    try:
        choice = torch._fused_sdp_choice(query, key, value, None, case.dropout_p, case.causal)
    except (AttributeError, RuntimeError):  # private: torch may rename it
        return "unknown"
    return _SDP_BACKENDS.get(int(choice), "unknown")


def _fused_backend(case: Case, query: Tensor, key: Tensor, value: Tensor) -> str:
    seed = rng.as_seed("profile", 0, query.device) if case.dropout_p else None
    diagonal = 0 if case.causal else None
    args = (query, key, value, None, None, seed, diagonal, case.head_dim**-0.5)
    module = dispatch.pick("attention", "", (*args, case.dropout_p, [0, 0, 0, 0]))
    file = dispatch.OPS["attention"]
    names = {path.format(file=file): name for name, path in dispatch.BACKENDS.items()}
    return names.get(module.__name__, module.__name__)


def label(impl: str, backend: str) -> str:
    """How a row is called. The reference is PyTorch's own ops, so it is never called fused."""
    if impl == "fused":
        return "reference (not fused)" if backend == "reference" else f"fused ({backend})"
    return f"torch SDPA ({backend})" if impl == "sdpa" else "plain (eager)"


def likely_label(impl: str, device: str) -> str:
    """A name for rows of a case that never ran, so that no backend was asked."""
    return {"fused": "fused (did not run)", "sdpa": "torch SDPA", "plain": "plain (eager)"}[impl]


def estimated_bytes(impl: str, backend: str, case: Case) -> int:
    """Bytes that forward and backward take beyond the inputs: what an N x N matrix each costs.

    A first guess for lengths where nothing was measured before; measurements replace it.
    """
    size = DTYPES[case.dtype].itemsize
    vectors = 6 * case.batch * case.heads * case.seq * case.head_dim * max(size, 4)
    square = case.batch * case.heads * case.seq**2
    if backend == "eager" or backend == "math":
        matrices = 4 * size + (2 * size + 1 if case.dropout_p else 0)
    elif backend == "reference":
        matrices = 20 + (40 if case.dropout_p else 0)
    else:
        matrices = 0
    return vectors + square * matrices


def relative_error(got: "list[Tensor]", truth: "list[Tensor]") -> float:
    """The largest of the tensors' errors: |got - truth| / |truth|, L2 norms."""
    errors = [
        float((g.detach().double() - t.detach().double()).norm() / t.detach().double().norm())
        for g, t in zip(got, truth, strict=True)
    ]
    return max(errors)


def error_of(impl: str, case: Case) -> "dict[str, float] | None":
    """Relative errors against the same problem in float64: {"forward", "backward"}.

    None with dropout for the implementations of torch, whose mask nothing else can repeat; ours
    is compared with the reference under the same seed.
    """
    if case.dropout_p and impl != "fused":
        return None
    tensors, exact = inputs(case), inputs(case, torch.float64)
    results = []
    for held in (tensors, exact):
        query, key, value, grad = held
        if case.dropout_p:
            name = "reference" if held is exact else None
            out = fused(query, key, value, case, seed=0, backend=name)
        elif held is exact:
            out = plain_attention(query, key, value, case.causal, 0.0)
        else:
            out = call(impl, case, held)[0]()
        results.append((out, torch.autograd.grad(out, (query, key, value), grad)))
    (out, grads), (true_out, true_grads) = results
    return {
        "forward": relative_error([out], [true_out]),
        "backward": relative_error(list(grads), list(true_grads)),
    }
