"""Attention's numbers: every pair of backends against float64, and properties of the formula."""

import dataclasses
import math

import attention_cases as cases
import pytest
import torch
from backends import BACKENDS, pairs
from bounds import assert_within_bound
from pairwise import describe, met_by_all

import fusedformer
from fusedformer.kernels import rng

attention = fusedformer.attention

pytestmark = pytest.mark.usefixtures("on_device", "poisoned_memory")


def _run_forward(backend: str, tensors: tuple, options: dict) -> tuple:
    """The op's arguments and its outputs."""
    recorded = {}
    op = torch.ops.fusedformer.attention_fwd.default

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is op:
                recorded["args"] = args
            return func(*args, **(kwargs or {}))

    with Spy(), torch.no_grad():
        out, lse = attention(*tensors, **options, return_lse=True, backend=backend)
    return recorded["args"], out, lse


def _worse(a: torch.Tensor, b: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The one with the larger error."""
    return b if (b - truth).abs().max() > (a - truth).abs().max() else a


def check_pairs(case: dict, device: str = "cpu", backends: tuple = BACKENDS) -> None:
    """The forward of each backend with the backward of each, against float64; see pairs()."""
    tensors, options, grads = cases.make_inputs(case, device)
    truth = cases.run_plain(tensors, options, grads, torch.float64)
    eager = cases.run_plain(tensors, options, grads, case["dtype"])
    if case["dtype"] in (torch.float32, torch.bfloat16):
        for _ in range(3):  # rounding depends on the order of the sums
            order = torch.randperm(case["dim"])
            saved = cases.run_saved_lse(tensors, options, grads, order)
            saved = {n: s.to(eager[n].dtype) for n, s in saved.items()}
            eager = {n: _worse(e, saved.get(n, e), truth[n]) for n, e in eager.items()}
    terms = cases.gradient_terms(tensors, options, grads)
    tensors = cases.poison(tensors, options["key_lengths"])
    met = pairs(cases.CASES.index(case) if case in cases.CASES else 0, backends)
    for forward in backends:
        args, out, lse = _run_forward(forward, tensors, options)
        assert_within_bound(f"out of {forward}", out, eager["out"], truth["out"])
        assert_within_bound(f"lse of {forward}", lse, eager["lse"], truth["lse"])
        mask = args[3]
        mask_grad = mask is not None and mask.is_floating_point()
        grad_out = torch.zeros_like(out) if grads[0] is None else grads[0]
        for backward in [second for first, second in met if first == forward]:
            found = torch.ops.fusedformer.attention_bwd.default(
                grad_out, grads[1], out, lse, *args[:-1], mask_grad, backward
            )
            names = ("grad_query", "grad_key", "grad_value", "grad_mask")
            for name, grad in zip(names, found, strict=True):
                if name == "grad_mask" and not mask_grad:
                    continue
                what = f"{name}, {forward} then {backward}"
                wanted, plain = truth[name], eager[name]
                if name == "grad_mask":
                    wanted, plain = wanted.view(grad.shape), plain.view(grad.shape)
                assert grad.dtype == plain.dtype, what
                assert_within_bound(what, grad, plain, wanted, terms[name])


# Triton's interpreter takes a time like the number of tiles. The covering set is whole only with
# the slow part, whose tiles there are at least 64 by 128: the lengths are chosen around them.
def _scores(case: dict) -> int:
    return case["batch"] * case["heads"][0] * case["queries"] * case["keys"]


FAST = [case for case in cases.CASES[::6] if _scores(case) < 20_000 and case["dim"] <= 128]
SLOW = [case for case in cases.CASES if case not in FAST]


@pytest.mark.parametrize("case", FAST, ids=describe)
def test_backend_pairs(case):
    check_pairs(case)


@pytest.fixture
def _large_tiles(monkeypatch):
    if torch.cuda.is_available():
        return
    from fusedformer.kernels.triton import attention as backend

    def larger(config):
        def enlarged(*args):
            found = config(*args)
            m, n = max(64, found.block_m), max(128, found.block_n)
            return dataclasses.replace(found, block_m=m, block_n=n)

        return enlarged

    for name in ("forward", "key_value_grads", "query_grads", "mask_grad"):
        config = getattr(backend, f"{name}_config")
        monkeypatch.setattr(backend, f"{name}_config", larger(config))


@pytest.mark.slow
@pytest.mark.usefixtures("_large_tiles")
@pytest.mark.parametrize("case", SLOW, ids=describe)
def test_backend_pairs_rest(case):
    check_pairs(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.CASES, ids=describe)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_backend_pairs_on_gpu(case, dtype):
    check_pairs({**case, "dtype": dtype}, "cuda")


def test_the_cases_cover_every_pair_of_options():
    assert met_by_all(cases.OPTIONS, cases.CASES)
    assert not met_by_all(cases.OPTIONS, cases.CASES[:9])


# At both ends of a tile and one off; the lengths between are slow.
_ENDS = (15, 16, 17, 31, 32, 33, 34)


@pytest.mark.parametrize(
    "keys",
    [pytest.param(n, marks=[] if n in _ENDS else pytest.mark.slow) for n in range(15, 35)],
)
def test_every_edge_of_a_tile(keys, monkeypatch):
    """Every length of the keys, and so every place of the diagonal, against tiles of 16 by 16."""
    from fusedformer.kernels.triton import attention as backend

    config = backend.Config(16, 16, warps=4, stages=1)
    for name in ("forward", "key_value_grads", "query_grads"):
        monkeypatch.setattr(backend, f"{name}_config", lambda *args: config)
    lengths = torch.arange(keys - 3, keys + 1)
    query = _random(4, 1, 17, 16).requires_grad_()
    key, value = (_random(4, 1, keys, 16).requires_grad_() for _ in range(2))
    upstream = torch.randn(4, 1, 17, 16)
    results = []
    for name in ("triton", "reference"):
        out = attention(query, key, value, key_lengths=lengths, causal=True, backend=name)
        results.append((out, *torch.autograd.grad(out, (query, key, value), upstream)))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)], ids=str)
def test_empty(backend, shape):
    batch, heads, n, m = shape
    query = torch.randn(batch, heads, n, 8, requires_grad=True)
    key, value = (torch.randn(batch, heads, m, 8, requires_grad=True) for _ in range(2))
    mask = torch.randn(heads, n, m, requires_grad=True)
    out, lse = attention(query, key, value, mask=mask, return_lse=True, backend=backend)
    assert out.shape == query.shape
    assert not out.any()
    assert (lse == -math.inf).all()
    out.sum().backward()
    for tensor in (query, key, value, mask):
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_worked_example(backend):
    query = torch.tensor([[1.0, 0.0, 2.0]])
    key = torch.tensor([[0.0, 4.0, 2.0], [1.0, 4.0, 3.0], [1.0, 0.0, 1.0]]).T
    value = torch.tensor([[1.0, 2.0, 3.0], [2.0, 8.0, 0.0], [2.0, 6.0, 3.0]])
    query, key, value = (t[None, None] for t in (query, key, value))
    weights = attention(query, key, torch.eye(3)[None, None], backend=backend)
    expected = torch.tensor([0.13613, 0.43194, 0.43194])
    torch.testing.assert_close(weights[0, 0, 0], expected, atol=1e-5, rtol=0)
    out = attention(query, key, value, backend=backend)
    expected = torch.tensor([1.8639, 6.3194, 1.7042])
    torch.testing.assert_close(out[0, 0, 0], expected, atol=1e-4, rtol=0)


def _random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_does_not_reach_the_past(backend):
    torch.manual_seed(0)
    query, key, value = (_random(1, 2, 150, 32) for _ in range(3))
    before = attention(query, key, value, causal=True, dropout_p=0.2, seed=1, backend=backend)
    for tensor in (query, key, value):
        tensor[:, :, 97:] += 3
    after = attention(query, key, value, causal=True, dropout_p=0.2, seed=1, backend=backend)
    assert torch.equal(before[:, :, :97], after[:, :, :97])
    assert not torch.equal(before[:, :, 97:], after[:, :, 97:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_sum_to_one(backend):
    torch.manual_seed(0)
    query, key = _random(2, 2, 100, 16), _random(2, 2, 70, 16)
    lengths = torch.tensor([70, 33])
    out = attention(
        query, key, torch.ones_like(key), key_lengths=lengths, causal=True, backend=backend
    )
    seen = torch.ones(2, 1, 100, 1)
    seen[:, :, :30] = 0  # causal, bottom-right aligned: the first 30 queries see no key
    torch.testing.assert_close(out, seen.expand(out.shape), atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shift_of_all_scores_changes_only_the_lse(backend):
    torch.manual_seed(0)
    query, key, value = (_random(1, 2, 65, 16) for _ in range(3))
    plain, lse = attention(query, key, value, return_lse=True, backend=backend)
    shifted, shifted_lse = attention(
        query, key, value, mask=torch.full((1, 1), 5.0), return_lse=True, backend=backend
    )
    torch.testing.assert_close(shifted, plain, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(shifted_lse, lse + 5, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_and_heads_are_independent(backend):
    torch.manual_seed(0)
    query, key, value = (_random(3, 4, 70, 16) for _ in range(3))
    out = attention(query, key, value, causal=True, backend=backend)
    batch, heads = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    permuted = attention(
        *(t[batch][:, heads] for t in (query, key, value)), causal=True, backend=backend
    )
    assert torch.equal(permuted, out[batch][:, heads])


def test_scaling_keeps_the_softmax_from_collapsing():
    """The paper's reason for 1 / sqrt(d_k) (section 3.2.1), as the entropy of the weights."""
    entropies = {}
    for scaled in (True, False):
        for dim in (4, 256):
            torch.manual_seed(0)
            query, key = _random(1, 1, 64, dim), _random(1, 1, 64, dim)
            value = torch.eye(64)[None, None]
            padded = torch.nn.functional.pad
            wide = max(dim, 64)
            weights = attention(
                padded(query, (0, wide - dim)),
                padded(key, (0, wide - dim)),
                padded(value, (0, wide - 64)),
                scale=dim**-0.5 if scaled else 1.0,
            )[..., :64]
            entropies[scaled, dim] = float(torch.special.entr(weights).sum(-1).mean())
    assert entropies[True, 256] > 0.9 * entropies[True, 4]
    assert entropies[False, 256] < 0.2 * entropies[False, 4]


# --- Dropout --------------------------------------------------------------------------------------


SMALL_TILES = pytest.param((16, 16), marks=pytest.mark.slow)


@pytest.mark.parametrize("offsets", [None, (1, 2, 48, 16)])
@pytest.mark.parametrize("block", [SMALL_TILES, (32, 64), (128, 32)], ids=str)
def test_masks_are_the_contracts_for_any_tile(block, offsets, monkeypatch):
    """With V the identity the output is the dropped weights themselves."""
    from fusedformer.kernels.triton import attention as backend

    config = backend.Config(*block, warps=4, stages=1)
    monkeypatch.setattr(backend, "forward_config", lambda *args: config)
    torch.manual_seed(0)
    query, key = _random(2, 3, 150, 100), _random(2, 3, 100, 100)
    value = torch.eye(100).expand(2, 3, 100, 100)
    weights = attention(
        query, key, value, dropout_p=0.3, seed=-5, offsets=offsets, backend="triton"
    )
    keep = rng.attention_keep(torch.tensor(-5), 0.3, (2, 3, 150, 100), offsets or (0, 0, 0, 0))
    assert torch.equal(weights != 0, keep)


@pytest.mark.parametrize("block", [SMALL_TILES, (32, 64), (64, 32)], ids=str)
def test_backward_drops_what_the_forward_dropped(block, monkeypatch):
    """dV, with dO the identity, is the transposed weights; dQ and dK have tiles of their own."""
    from fusedformer.kernels.triton import attention as backend

    config = backend.Config(*block, warps=4, stages=1)
    for name in ("key_value_grads_config", "query_grads_config"):
        monkeypatch.setattr(backend, name, lambda *args: config)
    torch.manual_seed(0)
    query, key, value = (_random(1, 2, 100, 100).requires_grad_() for _ in range(3))
    results = {}
    for name in BACKENDS:
        out = attention(query, key, value, dropout_p=0.4, seed=9, backend=name)
        grad_out = torch.eye(100).expand(1, 2, 100, 100)
        results[name] = torch.autograd.grad(out, (query, key, value), grad_out)
    keep = rng.attention_keep(torch.tensor(9), 0.4, (1, 2, 100, 100))
    assert torch.equal(results["triton"][2] != 0, keep.mT)
    for found, wanted in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_seeds(backend):
    torch.manual_seed(0)
    query, key, value = (_random(1, 2, 40, 16) for _ in range(3))

    def call(**options):
        return attention(query, key, value, dropout_p=0.5, backend=backend, **options)

    assert not torch.equal(call(), call())
    assert torch.equal(call(seed=3), call(seed=torch.tensor(3)))
    torch.manual_seed(1)
    first = call()
    torch.manual_seed(1)
    assert torch.equal(first, call())


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_of_zero_and_of_one(backend):
    torch.manual_seed(0)
    tensors = [_random(1, 2, 40, 16).requires_grad_() for _ in range(3)]
    none = attention(*tensors, backend=backend)
    assert torch.equal(attention(*tensors, dropout_p=0.0, seed=1, backend=backend), none)
    out, lse = attention(*tensors, dropout_p=1.0, return_lse=True, backend=backend)
    assert not out.any()
    torch.testing.assert_close(lse, attention(*tensors, return_lse=True)[1])
    out.sum().backward()
    assert not any(t.grad.any() for t in tensors)
    assert not any(t.grad.isnan().any() for t in tensors)


def test_dropout_is_unbiased():
    """The mean over many seeds approaches the output without dropout."""
    torch.manual_seed(0)
    query, key, value = (_random(1, 1, 24, 8) for _ in range(3))
    many = [attention(query, key, value, dropout_p=0.3, seed=s) for s in range(2000)]
    mean, spread = torch.stack(many).mean(0), torch.stack(many).std(0)
    z = (mean - attention(query, key, value)) / (spread / math.sqrt(2000))
    assert z.abs().max() < 5


def test_a_part_drops_what_the_whole_drops():
    torch.manual_seed(0)
    query, key, value = (_random(2, 4, 96, 16) for _ in range(3))
    whole = attention(query, key, value, causal=True, dropout_p=0.3, seed=2)
    for backend in BACKENDS:
        part = attention(
            query[1:, 2:, 48:], key[1:, 2:], value[1:, 2:], causal=True, dropout_p=0.3, seed=2,
            offsets=(1, 2, 48, 0), backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(part, whole[1:, 2:, 48:], atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
def test_triton_backward_is_deterministic():
    torch.manual_seed(0)
    tensors = [_random(1, 2, 130, 32).requires_grad_() for _ in range(3)]
    runs = []
    for _ in range(2):
        out = attention(*tensors, causal=True, dropout_p=0.1, seed=1, backend="triton")
        runs.append(torch.autograd.grad(out.square().sum(), tensors))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
