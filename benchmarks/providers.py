"""The three implementations of attention that a profile compares, by the names of ops/attention.py.

fused: this project's attention on the backend that its automatic choice takes here.
sdpa: torch.nn.functional.scaled_dot_product_attention.
plain: softmax(Q K^T / sqrt(d)) V written out in eager PyTorch.
"""

from collections.abc import Callable

from torch import Tensor

from fusedformer.benchmarks.ops import attention, common
from fusedformer.benchmarks.ops.attention import Case
from fusedformer.benchmarks.ops.common import Held
from fusedformer.kernels import dispatch, rng

IMPLS = ("fused", "sdpa", "plain")


def call(impl: str, case: Case, held: Held) -> tuple[Callable, Callable]:
    """(forward, backward) of an implementation: backward takes what forward returned."""
    function = attention.IMPLS[impl].make(case)
    return lambda: function(*held.args), common.backward_of(held)


def backend(impl: str, case: Case, tensors: list[Tensor]) -> str:
    """The name of the backend that an implementation runs this case on; only looks at shapes."""
    query, key, value = tensors[:3]
    if impl == "fused":
        return _fused_backend(case, query, key, value)
    return "eager" if impl == "plain" else attention.sdpa_backend(query, key, value, case)


def _fused_backend(case: Case, query: Tensor, key: Tensor, value: Tensor) -> str:
    seed = rng.as_seed("profile", 0, query.device) if case.dropout_p else None
    diagonal = 0 if case.causal else None
    args = (query, key, value, None, None, seed, diagonal, case.head_dim**-0.5)
    with common.backends_seen() as names:
        dispatch.pick("attention", "", (*args, case.dropout_p, [0, 0, 0, 0]))
    return names[0]


def label(impl: str, backend: str) -> str:
    """How a row is called. The reference is PyTorch's own ops, so it is never called fused."""
    if impl == "fused":
        return "reference (not fused)" if backend == "reference" else f"fused ({backend})"
    return f"torch SDPA ({backend})" if impl == "sdpa" else "plain (eager)"


def estimated_bytes(impl: str, backend: str, case: Case) -> int:
    """Bytes that forward and backward take beyond the inputs: what an N x N matrix each costs.

    A first guess for lengths where nothing was measured before; measurements replace it.
    """
    size = common.DTYPES[case.dtype].itemsize
    vectors = 6 * case.batch * case.heads * case.seq * case.head_dim * max(size, 4)
    square = case.batch * case.heads * case.seq**2
    if backend == "eager" or backend == "math":
        matrices = 4 * size + (2 * size + 1 if case.dropout_p else 0)
    elif backend == "reference":
        matrices = 20 + (40 if case.dropout_p else 0)
    else:
        matrices = 0
    return vectors + square * matrices


def error_of(impl: str, case: Case) -> "dict[str, float] | None":
    """Relative errors against the same problem in float64: {"forward", "backward"}.

    None with dropout for the implementations of torch, whose mask nothing else can repeat.
    """
    if case.dropout_p and impl != "fused":
        return None
    held = attention.inputs(case)
    seed = 0 if case.dropout_p else None
    make = attention.IMPLS[impl].make
    out = (make(case) if seed is None else attention.seeded(case, seed))(*held.args)
    return attention.compare(case, held, out, common.backward_of(held)(out), seed)
