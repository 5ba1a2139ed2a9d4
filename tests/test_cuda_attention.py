"""Attention's CUDA kernels on a Hopper GPU: with every other backend, and what is theirs alone."""

import attention_cases as cases
import pytest
import test_attention
import torch
from backends import needs_hopper
from pairwise import describe

from fusedformer import attention
from fusedformer.kernels import rng
from fusedformer.kernels.cuda import attention as on_cuda

pytestmark = [pytest.mark.gpu, needs_hopper]

BACKENDS = ("reference", "triton", "cuda")

TAKEN = [cases.taken_by_cuda(case) for case in cases.CASES]

# Many tiles for every CTA and many blocks in each, which the lengths above do not give.
LONG = [
    {**case, "batch": 2, "heads": (4, 2), "queries": 64 * n + 1, "keys": 61 * n, "dim": dim}
    for case, (n, dim) in zip(
        TAKEN[::20], ((9, 64), (16, 128), (25, 96), (33, 192), (40, 256), (12, 40)), strict=True
    )
]
DTYPES = (torch.bfloat16, torch.float16)


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*TAKEN, *LONG], ids=describe)
@pytest.mark.usefixtures("poisoned_memory")
def test_backend_pairs(case, dtype):
    test_attention.check_pairs({**case, "dtype": dtype}, "cuda", BACKENDS)


@pytest.mark.parametrize("case", [*TAKEN[::4], *LONG], ids=describe)
def test_backend_pairs_in_any_order_of_sums(case):
    """Without torch's deterministic mode, which poisoned memory switches on."""
    test_attention.check_pairs({**case, "dtype": torch.bfloat16}, "cuda", BACKENDS)


@pytest.mark.parametrize("dim", range(8, on_cuda.MAX_DIM + 1, 8))
@pytest.mark.usefixtures("poisoned_memory")
def test_every_head_dimension(dim):
    case = {**TAKEN[0], "queries": 130, "keys": 200, "dim": dim, "causal": True, "grads": "both"}
    test_attention.check_pairs({**case, "dtype": torch.bfloat16}, "cuda", BACKENDS)


@pytest.mark.parametrize("keys", range(120, 140))
@pytest.mark.usefixtures("poisoned_memory")
def test_every_edge_of_a_tile(keys):
    case = {**TAKEN[0], "queries": 129, "keys": keys, "dim": 64, "causal": True, "lengths": True}
    test_attention.check_pairs({**case, "dtype": torch.bfloat16}, "cuda", BACKENDS)


@pytest.mark.parametrize("offsets", [None, (1, 2, 48, 16)])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_masks_are_the_contracts(dim, offsets):
    """With V, or dO, the identity: the dropped weights themselves, and their transpose in dV."""
    query, key = torch.zeros(2, 3, 4, 300, dim, dtype=torch.bfloat16, device="cuda")  # all alike
    shape, identity = (3, 4, 300, dim), torch.eye(dim, dtype=torch.bfloat16, device="cuda")
    seed = torch.tensor(-5, device="cuda")
    keep = rng.attention_keep(seed, 0.3, shape, offsets or (0, 0, 0, 0))
    options = {"dropout_p": 0.3, "seed": seed, "offsets": offsets, "backend": "cuda"}
    key, value = key[:, :, :dim], identity.repeat(3, 4, 1, 1)
    assert torch.equal(attention(query, key, value, **options) != 0, keep)

    keep = rng.attention_keep(seed, 0.3, (3, 4, dim, 300), offsets or (0, 0, 0, 0))
    query, key, value = query[:, :, :dim], query, torch.zeros_like(query).requires_grad_()
    out = attention(query, key, value, **options)
    (grad_value,) = torch.autograd.grad(out, value, identity.repeat(3, 4, 1, 1))
    assert torch.equal(grad_value != 0, keep.mT)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.usefixtures("poisoned_memory")
def test_repetitions_are_bitwise_equal(dim):
    tensors = [_random(2, 8, 1500, dim).requires_grad_() for _ in range(3)]
    grad = _random(2, 8, 1500, dim)
    first = None
    for _ in range(100):
        out = attention(*tensors, causal=True, dropout_p=0.1, seed=1, backend="cuda")
        found = (out, *torch.autograd.grad(out, tensors, grad))
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


@pytest.mark.usefixtures("poisoned_memory")
def test_the_future_does_not_reach_the_past():
    query, key, value = (_random(1, 2, 550, 64) for _ in range(3))
    options = {"causal": True, "dropout_p": 0.2, "seed": 1, "backend": "cuda"}
    before = attention(query, key, value, **options)
    for tensor in (query, key, value):
        tensor[:, :, 297:] += 3
    after = attention(query, key, value, **options)
    assert torch.equal(before[:, :, :297], after[:, :, :297])
    assert not torch.equal(before[:, :, 297:], after[:, :, 297:])


def test_batch_and_heads_are_independent():
    query, key, value = (_random(3, 4, 300, 128) for _ in range(3))
    out = attention(query, key, value, causal=True, backend="cuda")
    batch, heads = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    permuted = (t[batch][:, heads] for t in (query, key, value))
    again = attention(*permuted, causal=True, backend="cuda")
    assert torch.equal(again, out[batch][:, heads])


def test_a_cuda_graph_draws_a_new_mask_at_each_replay():
    """Which also needs all to run on torch's current stream."""
    tensors = [_random(1, 2, 200, 64) for _ in range(3)]
    attention(*tensors, dropout_p=0.5, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed = torch.randint(2**62, (), device="cuda")
        out = attention(*tensors, dropout_p=0.5, seed=seed, backend="cuda")
    seen = []
    for _ in range(2):
        graph.replay()
        wanted = attention(*tensors, dropout_p=0.5, seed=seed.clone(), backend="cuda")
        assert torch.equal(out, wanted)
        seen.append(out.clone())
    assert not torch.equal(*seen)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one():
    tensors = [_random(1, 2, 200, 64).to("cuda:1") for _ in range(3)]
    out = attention(*tensors, backend="cuda")
    wanted = attention(*(t.to("cuda:0") for t in tensors), backend="cuda")
    assert torch.equal(out.to("cuda:0"), wanted)
