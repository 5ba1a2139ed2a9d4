"""Attention: fusedformer.attention, torch's, the formula, and those of attention_peers.py.

FLOPs count the two products of the forward, 4 B H N^2 D, and the five of the backward, two and a
half times that; causal counts half. Bytes are those of reading each input and writing each output
once: Q, K, V, O, and the LSE in float32; the backward reads these and dO and writes dQ, dK, dV.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fusedformer
from fusedformer.benchmarks.ops import attention_peers, common
from fusedformer.benchmarks.ops.common import Distance, Held, Impl, Op, Sizes
from fusedformer.kernels import dispatch, rng


@dataclass(frozen=True)
class Case(Sizes):
    """One attention problem: (batch, heads, seq, head_dim) queries; keys and values alike.

    ``kv_heads`` is the number of heads of keys and values, 0 for that of queries. With ``padded``,
    sequences have lengths from half of ``seq`` to ``seq``, given as key lengths.
    """

    batch: int
    heads: int
    seq: int
    head_dim: int
    dtype: str = "fp32"
    causal: bool = False
    dropout_p: float = 0.0
    device: str = "cpu"
    kv_heads: int = 0
    padded: bool = False

    @property
    def group(self) -> int:
        """Query heads for each head of keys and values."""
        return self.heads // (self.kv_heads or self.heads)


def inputs(case: Case, seed: int = 0) -> Held:
    """Random query, key, value (which require gradients), key lengths if padded; dO."""
    generator = common.generator(case, seed)
    size = (case.batch, case.heads, case.seq, case.head_dim)
    kv_size = (case.batch, case.kv_heads or case.heads, case.seq, case.head_dim)
    qkv = [
        common.random(generator, shape, case).requires_grad_() for shape in (size, kv_size, kv_size)
    ]
    grad = common.random(generator, size, case)
    if not case.padded:
        return Held(qkv, grad)
    lengths = torch.randint(
        (case.seq + 1) // 2, case.seq + 1, (case.batch,), generator=generator, device=case.device
    )
    return Held([*qkv, lengths.int()], grad)


# --- Implementations ------------------------------------------------------------------------------


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: "Tensor | None" = None,
    *,
    causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """dropout(softmax(Q K^T / sqrt(d))) V, every step a tensor of its own; (B, H, N, D)."""
    if query.shape[1] != key.shape[1]:
        group = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    if key_lengths is not None:
        padding = torch.arange(key.shape[2], device=query.device) >= key_lengths[:, None]
        scores = scores.masked_fill(padding[:, None, None, :], -math.inf)
    return torch.nn.functional.dropout(scores.softmax(-1), dropout_p) @ value


def seeded(
    case: Case, seed: "int | None" = None, backend: "str | None" = None
) -> Callable[..., Tensor]:
    """fusedformer.attention with the problem's options, as a function of its tensors."""

    def call(
        query: Tensor, key: Tensor, value: Tensor, key_lengths: "Tensor | None" = None
    ) -> Tensor:
        out = fusedformer.attention(
            query, key, value, key_lengths=key_lengths, causal=case.causal,
            dropout_p=case.dropout_p, seed=seed, backend=backend,
        )  # fmt: skip
        assert isinstance(out, Tensor)  # a pair only with return_lse
        return out

    return call


def _plain(case: Case) -> Callable[..., Tensor]:
    return functools.partial(plain_attention, causal=case.causal, dropout_p=case.dropout_p)


def _compiled(case: Case) -> Callable[..., Tensor]:
    call = common.compiled(plain_attention)
    return functools.partial(call, causal=case.causal, dropout_p=case.dropout_p)


def _sdpa(case: Case) -> Callable[..., Tensor]:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    gqa = case.group > 1

    def call(
        query: Tensor, key: Tensor, value: Tensor, key_lengths: "Tensor | None" = None
    ) -> Tensor:
        if key_lengths is None:
            return sdpa(
                query, key, value, dropout_p=case.dropout_p, is_causal=case.causal, enable_gqa=gqa
            )
        position = torch.arange(case.seq, device=query.device)
        mask = (position < key_lengths[:, None])[:, None, None, :]
        if case.causal:
            mask = mask & (position <= position[:, None])
        return sdpa(query, key, value, mask, dropout_p=case.dropout_p, enable_gqa=gqa)

    return call


def _forced(case: Case, backend: SDPBackend) -> Callable[..., Tensor]:
    inner = _sdpa(case)

    def call(*args: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return inner(*args)

    return call


def _gpu_alone(case: Case) -> "str | None":
    return None if case.device == "cuda" else "on a CPU torch has one fused path, which sdpa takes"


def _own(backend: str) -> Impl:
    """fusedformer.attention on one of its backends of GPUs."""

    def refuses(case: Case) -> "str | None":
        if case.device != "cuda":
            return "on a CPU there is one fused backend, which fused takes"
        if backend not in dispatch.BACKENDS:
            return f"there is no backend {backend}"
        return dispatch.available_backends("attention", case.device)[backend]

    about = f"the same, its {backend} backend forced"
    return Impl(about, functools.partial(seeded, backend=backend), refuses)


IMPLS = {
    "fused": Impl("fusedformer.attention, on the backend of its automatic choice", seeded),
    **{f"fused-{backend}": _own(backend) for backend in ("triton", "cuda")},
    "sdpa": Impl("torch's scaled_dot_product_attention, on the backend that it takes", _sdpa),
    **{
        f"sdpa-{name}": Impl(
            f"the same, its {name} backend forced",
            functools.partial(_forced, backend=backend),
            _gpu_alone,
        )
        for name, backend in (
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
            ("math", SDPBackend.MATH),
        )
    },
    "plain": Impl("softmax(Q K^T / sqrt(d)) V in eager PyTorch", _plain),
    "compile": Impl("torch.compile of plain", _compiled, compiles=True),
    **attention_peers.IMPLS,
}


# --- Bytes, FLOPs, memory -------------------------------------------------------------------------


def flops(case: Case, mode: str) -> float:
    """Floating-point operations of a mode; see the file's docstring."""
    forward = 4.0 * case.batch * case.heads * case.seq**2 * case.head_dim
    if case.causal:
        forward /= 2
    return common.cost(mode, forward, 2.5 * forward)


def moved(case: Case, mode: str) -> float:
    """Bytes of a mode; see the file's docstring."""
    row = case.batch * case.seq * case.head_dim * common.DTYPES[case.dtype].itemsize
    query, key = row * case.heads, row * (case.kv_heads or case.heads)
    lse = 4 * case.batch * case.heads * case.seq
    return common.cost(mode, 2 * query + 2 * key + lse, 4 * query + 4 * key + lse)


# Bytes per score that an implementation with N x N matrices holds at its peak, and what dropout
# adds: in units of the dtype's size, and beyond.
_MATRICES = {"plain": (4, 0, 2, 1), "compile": (4, 0, 2, 1), "sdpa-math": (4, 0, 2, 1)}


def peak(impl: str, case: Case) -> float:
    """A guess of the bytes beyond the inputs that forward and backward take; see Op.peak."""
    size = common.DTYPES[case.dtype].itemsize
    vectors = 6 * case.batch * case.heads * case.seq * case.head_dim * max(size, 4)
    if impl == "sdpa" and case.device == "cpu" and (case.dropout_p or case.padded):
        impl = "sdpa-math"
    if impl not in _MATRICES:
        return vectors
    sized, fixed, dropped_sized, dropped = _MATRICES[impl]
    score = sized * size + fixed
    if case.dropout_p:
        score += dropped_sized * size + dropped
    return vectors + float(score) * case.batch * case.heads * case.seq**2


# --- Errors ---------------------------------------------------------------------------------------

_BLOCK = 512  # queries of the truth at a time


def checked(case: Case) -> Case:
    """The problem, or one of a length that float64 can do in about a second."""
    return case.at(seq=min(case.seq, 16384 if case.device == "cuda" else 4096))


def compare(
    case: Case,
    held: Held,
    out: Tensor,
    grads: "tuple[Tensor, ...] | None",
    seed: "int | None" = None,
) -> dict[str, float]:
    """Relative errors against float64 of the last sequence's last head of keys, and its queries.

    Written out once more, block by block of queries, so that it shares nothing with what it tests.
    """
    b, h, group = case.batch - 1, (case.kv_heads or case.heads) - 1, case.group
    heads = slice(h * group, (h + 1) * group)
    query, key, value, *lengths = (t.detach() for t in held.args)
    q, grad = (t[b, heads].double() for t in (query, held.grad))
    k, v = (t[b, h].double() for t in (key, value))
    kept = torch.arange(case.seq, device=q.device)
    limit = int(lengths[0][b]) if lengths else case.seq
    error, d_query = Distance(), Distance()
    d_key, d_value = torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, case.seq, _BLOCK):
        rows = slice(start, min(start + _BLOCK, case.seq))
        scores = q[:, rows] @ k.T / math.sqrt(case.head_dim)
        hidden = (kept >= limit).expand(scores.shape)
        if case.causal:
            hidden = hidden | (kept > kept[rows, None])
        p = scores.masked_fill(hidden, -math.inf).softmax(-1)
        scale = torch.ones((), dtype=torch.float64, device=q.device)
        if seed is not None:
            at = rng.as_seed("compare", seed, q.device)
            keep = rng.attention_keep(
                at, case.dropout_p, (1, *scores.shape), (b, h * group, start, 0)
            )
            scale = keep[0] / (1 - case.dropout_p)
        o = (p * scale) @ v
        error.add(out[b, heads, rows], o)
        if grads is None:
            continue
        d_p = (grad[:, rows] @ v.T) * scale
        d_s = p * (d_p - (grad[:, rows] * o).sum(-1, keepdim=True)) / math.sqrt(case.head_dim)
        d_query.add(grads[0][b, heads, rows], d_s @ k)
        d_key += (d_s.transpose(-2, -1) @ q[:, rows]).sum(0)
        d_value += ((p * scale).transpose(-2, -1) @ grad[:, rows]).sum(0)
    found = {"forward": error.value()}
    if grads is not None:
        worst = [d_query.value()]
        for got, truth in ((grads[1], d_key), (grads[2], d_value)):
            distance = Distance()
            distance.add(got[b, h], truth)
            worst.append(distance.value())
        found["backward"] = max(worst)
    return found


OP = Op(
    name="attention",
    case=Case,
    inputs=inputs,
    impls=IMPLS,
    eager="plain",
    flops=flops,
    moved=moved,
    seeded=seeded,
    compare=compare,
    checked=checked,
    tiny=lambda case: case.at(seq=min(case.seq, 32)),
    peak=peak,
    x="seq",
)


def sdpa_backend(
    query: Tensor, key: Tensor, value: Tensor, case: Case, mask: "Tensor | None" = None
) -> str:
    """The name of the backend that torch's SDPA takes for a problem."""
    names = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "overrideable"}
    try:
        choice = torch._fused_sdp_choice(
            query, key, value, mask, case.dropout_p, case.causal and mask is None,
            enable_gqa=case.group > 1,
        )  # fmt: skip
    except (AttributeError, RuntimeError):  # private: torch may rename it
        return "unknown"
    return names.get(int(choice), "unknown")
