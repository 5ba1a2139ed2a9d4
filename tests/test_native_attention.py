"""Attention's C++ kernels: each instruction set, any number of threads, edges of the arithmetic."""

import math

import attention_cases
import pytest
import test_attention
import torch
from backends import BACKENDS
from test_native import PAIR, in_bfloat16

from fusedformer import attention
from fusedformer.kernels import rng

pytestmark = [
    pytest.mark.skipif("cpu" not in BACKENDS, reason="there is no C++ library here, or a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# --- Instruction sets -----------------------------------------------------------------------------


def _cases(start: int, step: int) -> list:
    cases = attention_cases.CASES[start::step]
    return cases + [in_bfloat16(case) for case in cases if case["dtype"] == torch.float16]


@pytest.mark.parametrize(
    "start", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 24))]
)
def test_pairs(isa, start):
    for case in _cases(start, 24):
        test_attention.check_pairs(case, backends=PAIR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offsets", [None, (1, 2, 48, 16)])
def test_masks_are_the_contracts(isa, dtype, offsets):
    """The output, with V the identity, and dV, with dO the identity, are the dropped weights."""
    torch.manual_seed(0)
    query, key = (torch.randn(2, 3, 150, 150).to(dtype) for _ in range(2))
    value = torch.eye(150, dtype=dtype).expand(2, 3, 150, 150).clone().requires_grad_()
    for seed in (-5, 2**62 + 12345):
        weights = attention(
            query, key, value, dropout_p=0.3, seed=seed, offsets=offsets, scale=0.01, backend="cpu"
        )
        keep = rng.attention_keep(torch.tensor(seed), 0.3, (2, 3, 150, 150), offsets or (0,) * 4)
        assert torch.equal(weights != 0, keep)
        (grad,) = torch.autograd.grad(
            weights, value, torch.eye(150, dtype=dtype).expand_as(weights)
        )
        assert torch.equal(grad != 0, keep.mT)


@pytest.mark.parametrize("p", [2**-32, 0.001, 1 - 2**-32])
def test_thresholds_at_the_ends(isa, p):
    query = torch.zeros(1, 1, 256, 256)
    value = torch.eye(256)[None, None]
    weights = attention(query, query, value, dropout_p=p, seed=3, backend="cpu")
    keep = rng.attention_keep(torch.tensor(3), p, (1, 1, 256, 256))
    assert torch.equal(weights != 0, keep)


# --- Threads --------------------------------------------------------------------------------------


def _everything(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, n, 40, dtype=dtype, requires_grad=True)
        for heads, n in ((4, 500), (2, 700), (2, 700))
    )
    mask = torch.randn(1, 4, 1, 700, requires_grad=True)
    out, lse = attention(
        query, key, value, mask=mask, causal=True, key_lengths=torch.tensor([700, 613]),
        dropout_p=0.1, seed=1, return_lse=True, backend="cpu",
    )  # fmt: skip
    wanted = (query, key, value, mask)
    return [out, lse, *torch.autograd.grad((out.float().sin().sum(), lse.sum()), wanted)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_result_depends_on_the_number_of_threads(dtype, threads):
    threads(1)
    wanted = _everything(dtype)
    for count in (2, 3, 5):
        threads(count)
        for _ in range(3):  # threads meet otherwise each time
            for found, one in zip(_everything(dtype), wanted, strict=True):
                assert torch.equal(found, one)


def test_one_head_of_keys_for_many_threads(threads):
    """Its blocks of keys add to the same dQ, one after another."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, 1, 2000, 16, requires_grad=True) for _ in range(3)]
    grads = {}
    for count in (1, 4):
        threads(count)
        out = attention(*tensors, backend="cpu")
        grads[count] = torch.autograd.grad(out.square().sum(), tensors)
    for found, one in zip(grads[4], grads[1], strict=True):
        assert torch.equal(found, one)


# --- Edges of the arithmetic ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_a_scale_of_zero_averages(isa, dtype, causal):
    torch.manual_seed(0)
    query, key = (torch.randn(1, 1, 130, 8).to(dtype) for _ in range(2))
    value = torch.ones(1, 1, 130, 8, dtype=dtype)
    out, lse = attention(
        query, key, value, scale=0.0, causal=causal, return_lse=True, backend="cpu"
    )
    torch.testing.assert_close(out, value, atol=1e-2, rtol=0)
    seen = torch.arange(1, 131) if causal else torch.full((130,), 130)
    torch.testing.assert_close(lse[0, 0], seen.log(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_scores(isa, dtype, size):
    """One key takes all: no overflow, no NaN, and weights of exactly 0 elsewhere."""
    key = torch.eye(64)[None, None].to(dtype)
    value = torch.arange(64.0)[:, None].expand(64, 64)[None, None].to(dtype).contiguous()
    tensors = [(size * key).requires_grad_(), key.requires_grad_(), value.requires_grad_()]
    out, lse = attention(*tensors, scale=1.0, return_lse=True, causal=True, backend="cpu")
    assert torch.equal(out, value)
    torch.testing.assert_close(
        lse, torch.full_like(lse, tensors[0].max().item()), rtol=1e-6, atol=0
    )
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_spoils_its_own_row_alone(isa, dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 100, 24).to(dtype) for _ in range(3))
    query[0, 0, 33, 5] = math.nan
    out, lse = attention(query, key, value, return_lse=True, backend="cpu")
    row = torch.arange(100) == 33
    assert torch.equal(out.isnan().all(-1)[0, 0], row)
    assert torch.equal(out.isnan().any(-1)[0, 0], row)
    assert torch.equal(lse.isnan()[0, 0], row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_additive_masks_of_every_dtype(dtype, stored):
    """A mask in another dtype than the query's, along either dimension: as in float32."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 70, 16).to(dtype) for _ in range(3))
    for shape in [(70, 70), (1, 70), (70, 1)]:
        mask = torch.randn(shape).to(stored).masked_fill(torch.rand(shape) > 0.8, -math.inf)
        for given in (mask, mask.mT.contiguous().mT):
            out = attention(query, key, value, mask=given, backend="cpu")
            wide = attention(query, key, value, mask=mask.float(), backend="cpu")
            assert torch.equal(out, wide)
