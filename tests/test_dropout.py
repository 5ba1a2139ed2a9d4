"""Dropout: which elements, how they are scaled, and the same ones backward."""

import math

import pytest
import torch
from backends import ROW_BACKENDS as BACKENDS
from bounds import assert_within_bound
from torch.utils.checkpoint import checkpoint

import fusedformer
from fusedformer.kernels import rng

pytestmark = pytest.mark.usefixtures("on_device", "poisoned_memory", "fresh_compiler")
SEED = 2**50 + 3

dropout = fusedformer.dropout

# Scalars, few long rows, many short ones, widths beside a tile's, three dimensions.
SHAPES = [(), (1,), (37,), (5000,), (37, 1), (199, 17), (20, 63), (9, 256), (3, 2100), (4, 5, 760)]


def keep_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """What is kept of x, True = kept."""
    width = x.shape[-1] if x.dim() else 1
    seed = torch.tensor(SEED)
    return rng.rows_keep(seed, p, x.numel() // width, width, rng.DROPOUT).view(x.shape)


def check_pairs(
    shape: tuple, dtype: torch.dtype, p: float, backends: tuple[str, ...] = BACKENDS
) -> None:
    """The forward of each backend with the backward of each, and against the formula."""
    x = torch.randn(shape, dtype=dtype)
    upstream = torch.randn(shape, dtype=dtype)
    keep = keep_mask(x, p)
    for forward in backends:
        leaf = x.clone().requires_grad_()
        out = dropout(leaf, p, seed=SEED, backend=forward)
        assert out.is_contiguous()
        assert torch.equal(out != 0, keep & (x != 0))
        truth = x.double() * keep / (1 - p)
        assert_within_bound(forward, out, x * keep / (1 - p), truth)
        for backward in backends:
            seed = torch.tensor(SEED)
            grad = torch.ops.fusedformer.dropout_bwd(upstream, seed, p, backward)
            assert torch.equal(grad != 0, keep & (upstream != 0))
            truth = upstream.double() * keep / (1 - p)
            assert_within_bound(backward, grad, upstream * keep / (1 - p), truth)
        (grad,) = torch.autograd.grad(out, leaf, upstream)
        assert grad.dtype == dtype
        assert torch.equal(grad != 0, keep & (upstream != 0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "p"), [(torch.float32, 0.1), (torch.float16, 0.7)], ids=str)
def test_backend_pairs(shape, dtype, p):
    check_pairs(shape, dtype, p)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (70000, 1000)], ids=str)
@pytest.mark.parametrize("p", [1e-3, 0.1])
def test_backend_pairs_in_bfloat16(shape, p):
    check_pairs(shape, torch.bfloat16, p)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["transposed", "every other", "rows apart", "expanded"])
def test_strides(backend, layout):
    x = {
        "transposed": lambda: torch.randn(40, 30).T,
        "every other": lambda: torch.randn(30, 80)[:, ::2],
        "rows apart": lambda: torch.randn(30, 50)[:, 3:43],
        "expanded": lambda: torch.randn(()).expand(30, 40),
    }[layout]()
    upstream = torch.randn(40, 30).T
    leaf = x.detach().requires_grad_()
    out = dropout(leaf, 0.3, seed=SEED, backend=backend)
    keep = keep_mask(x, 0.3)
    torch.testing.assert_close(out, x * keep / 0.7)
    (grad,) = torch.autograd.grad(out, leaf, upstream, retain_graph=True)
    torch.testing.assert_close(grad, upstream * keep / 0.7)
    (grad,) = torch.autograd.grad(out.sum(), leaf)  # an expanded gradient, of stride 0
    torch.testing.assert_close(grad, keep / 0.7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_is_scaled(backend):
    """0.2 scales what it keeps by 1.25."""
    out = dropout(torch.ones(100, 8), 0.2, backend=backend)
    assert set(out.unique().tolist()) == {0.0, 1.25}


@pytest.mark.parametrize("p", [1e-3, 0.01, 0.1, 0.5])
def test_marginal_probability_and_correlation(p):
    """On the kernel's own output: |z| over 5 has a chance of 6e-7, and the seed is fixed."""
    n = 2**17
    dropped = (dropout(torch.ones(n), p, seed=SEED, backend="triton") == 0).double() - p
    variance = p * (1 - p)
    assert abs(float(dropped.sum())) / math.sqrt(n * variance) < 5
    for lag in (1, 2, 3, 16, 64, 1024):
        z = float((dropped[lag:] * dropped[:-lag]).sum()) / (variance * math.sqrt(n - lag))
        assert abs(z) < 5, lag
    # Elements 4, 8 and 12 apart may share a word: they agree by ties of the top byte, under 1/256.
    calls = dropped.view(-1, 4, 4)
    for apart in (1, 2, 3):
        correlation = float((calls[:, apart:] * calls[:, :-apart]).mean()) / variance
        slack = 5 / math.sqrt(calls[:, apart:].numel())
        assert abs(correlation) < 1 / 256 / variance + slack, apart


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_named_by_their_position(backend):
    """Leading dimensions are flattened; the first rows drop what they would drop alone."""
    x = torch.ones(6, 50)
    whole = dropout(x, 0.4, seed=1, backend=backend)
    assert torch.equal(dropout(x.view(2, 3, 50), 0.4, seed=1, backend=backend).view(6, 50), whole)
    assert torch.equal(dropout(x[:4], 0.4, seed=1, backend=backend), whole[:4])
    assert torch.equal(dropout(x[:, :30], 0.4, seed=1, backend=backend), whole[:, :30])


def test_seeds():
    x = torch.ones(4, 100)
    assert not torch.equal(dropout(x), dropout(x))
    assert torch.equal(dropout(x, seed=7), dropout(x, seed=torch.tensor(7)))
    assert not torch.equal(dropout(x, seed=7), dropout(x, seed=8))
    assert not torch.equal(dropout(x, seed=7), dropout(x, seed=7 + 2**32))
    torch.manual_seed(3)
    first = dropout(x)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x))


def test_nothing_and_everything_dropped():
    x = torch.randn(5, 6, requires_grad=True)
    assert dropout(x, 0.0) is x
    assert dropout(x, 0.3, training=False) is x
    hostile = torch.full((5, 6), torch.nan, requires_grad=True)
    out = dropout(hostile, 1.0)
    assert torch.equal(out, torch.zeros(5, 6))
    out.backward(torch.full((5, 6), torch.inf))
    assert torch.equal(hostile.grad, torch.zeros(5, 6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_dropped_is_zero_whatever_it_held(backend):
    x = torch.full((3, 64), torch.inf)
    assert torch.equal(dropout(x, 0.5, seed=SEED, backend=backend) == 0, ~keep_mask(x, 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (0, 7), (7, 0)], ids=str)
def test_empty(backend, shape):
    x = torch.randn(shape, requires_grad=True)
    out = dropout(x, 0.5, backend=backend)
    assert out.shape == shape
    out.sum().backward()
    assert x.grad.shape == shape


def test_only_the_seed_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        dropout(torch.randn(50, 50, requires_grad=True), 0.1)
    assert [tensor.numel() for tensor in kept] == [1]


def test_gradcheck():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.4, seed=1, backend="reference"), x)


def test_opcheck():
    ops = torch.ops.fusedformer
    for op in (ops.dropout_fwd.default, ops.dropout_bwd.default):
        torch.library.opcheck(op, (torch.randn(3, 7, 20), torch.tensor(1), 0.2, ""))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compile_with_dynamic_shapes(requires_grad):
    def block(x):
        return dropout(x.sin(), 0.3, seed=5, backend="triton").cos()

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((4, 20), (9, 33)):
        x = torch.randn(shape, requires_grad=requires_grad)
        torch.testing.assert_close(compiled(x), block(x))
        if requires_grad:
            (found,) = torch.autograd.grad(compiled(x).sum(), x)
            torch.testing.assert_close(found, torch.autograd.grad(block(x).sum(), x)[0])


def test_export():
    class Block(torch.nn.Module):
        def forward(self, x):
            return dropout(x, 0.5)

    program = torch.export.export(Block(), (torch.ones(8, 16),))
    module = program.module()
    # The seed is drawn in the graph, not baked into it.
    assert not torch.equal(module(torch.ones(8, 16)), module(torch.ones(8, 16)))


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpoint_drops_the_same_again(compiled):
    x = torch.randn(6, 64, requires_grad=True)

    def block(x):
        return dropout(x, 0.5) ** 2

    def recomputed(x):
        return checkpoint(block, x, use_reentrant=False)

    if compiled:
        recomputed = torch.compile(recomputed, fullgraph=True, backend="aot_eager")
    for function in (block, recomputed):
        out = function(x)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(grad != 0, out != 0)


def test_autocast_keeps_the_dtype():
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert dropout(torch.randn(3, 4)).dtype == torch.float32


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "x must be a tensor; got list"),
        ([torch.zeros(2, dtype=torch.int64)], {}, TypeError, "x must be float32.* got torch.int64"),
        ([torch.zeros(2), -0.5], {}, ValueError, "p must be from 0 to 1; got -0.5"),
        ([torch.zeros(2), 1.5], {}, ValueError, "p must be from 0 to 1; got 1.5"),
        ([torch.zeros(2), math.nan], {}, ValueError, "p must be from 0 to 1; got nan"),
        ([torch.zeros(2), None], {}, TypeError, "p must be a number from 0 to 1; got None"),
        ([torch.zeros(2)], {"seed": "1"}, TypeError, "seed must be an int"),
        ([torch.zeros(2)], {"seed": 2**64}, ValueError, "seed must fit in 64 bits"),
        ([torch.zeros(2)], {"backend": "fast"}, ValueError, "backend must be one of .* 'fast'"),
    ],
)
def test_bad_input(args, kwargs, error, message):
    with pytest.raises(error, match="dropout: " + message):
        dropout(*args, **kwargs)


def test_a_named_backend_says_why_it_cannot_run():
    with pytest.raises(RuntimeError, match=r"'triton' cannot run: torch.float64"):
        dropout(torch.zeros(2, dtype=torch.float64), backend="triton")


@pytest.mark.gpu
def test_graph_replay_draws_fresh_masks():
    x = torch.ones(64, 512, device="cuda", requires_grad=True)

    def step():
        out = dropout(x, 0.5)
        return out, torch.autograd.grad(out.sum(), x)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grad = step()
    masks = []
    for _ in range(3):
        graph.replay()
        assert torch.equal(out != 0, grad != 0)
        masks.append(out != 0)
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])
