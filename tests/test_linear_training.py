"""Linear layers in training, through oneDNN: numbers, derivatives, and where torch computes."""

import weakref

import pytest
import torch
from bounds import assert_within_bound
from layouts import matrix
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from fusedformer.kernels import dispatch, linear_cross_entropy, linear_training
from fusedformer.kernels.linear_training import linear_in_training, product
from fusedformer.nn.linear import linear

pytestmark = pytest.mark.skipif(
    not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
    or torch.cuda.is_available(),
    reason="this torch has no oneDNN",
)


@pytest.fixture(autouse=True)
def pays(monkeypatch):
    """On every processor."""
    monkeypatch.setattr(linear_training, "_pays", lambda: True)


def leaves(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def plain(tensors, upstream, dtype):
    copies = [t.detach().to(dtype).requires_grad_() for t in tensors]
    y = functional.linear(*copies)
    return y.detach(), *torch.autograd.grad(y, copies, upstream.to(dtype))


LAYOUTS = {
    "rows": lambda: torch.randn(130, 300),
    "batches": lambda: torch.randn(2, 70, 300),
    "transposed": lambda: torch.randn(2, 300, 70).transpose(1, 2),
    "cut": lambda: torch.randn(2, 70, 303)[..., :300],
    "expanded": lambda: torch.randn(1, 70, 300).expand(2, -1, -1),
    "overlapping": lambda: torch.randn(1000).unfold(0, 300, 10),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("upstream", ["dense", "expanded"])
def test_numbers(layout, biased, upstream):
    torch.manual_seed(0)
    x = LAYOUTS[layout]().requires_grad_()
    tensors = [x, *leaves((257, 300), (257,))[: 2 if biased else 1]]
    grad = torch.randn(()).expand(*x.shape[:-1], 257)
    if upstream == "dense":
        grad = torch.randn(grad.shape)
    y = linear_in_training(*tensors, *([] if biased else [None]))
    assert y.is_contiguous()
    found = (y, *torch.autograd.grad(y, tensors, grad))
    eager, truth = (plain(tensors, grad, dtype) for dtype in (torch.float32, torch.float64))
    names = ("y", "x", "weight", "bias")[: len(found)]
    for name, one, other, true in zip(names, found, eager, truth, strict=True):
        assert_within_bound(name, one, other, true)


@pytest.mark.parametrize("which", range(3))
def test_only_what_is_wanted(which):
    tensors = leaves((70, 300), (257, 300), (257,))
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index == which)
    y = linear(*tensors)
    y.sum().backward()
    assert [t.grad is not None for t in tensors] == [index == which for index in range(3)]


@pytest.mark.parametrize("terms", [768, 1024, 2048, 4096])
def test_long_sums(terms):
    """Of the result, and then of input's gradient, and of the weight's."""
    for rows, width, columns in ((128, terms, 64), (128, 64, terms), (terms, 64, 1024)):
        tensors = leaves((rows, width), (columns, width))
        grad = torch.randn(rows, columns)
        y = linear(*tensors, None)
        found = (y, *torch.autograd.grad(y, tensors, grad))
        eager, truth = (plain(tensors, grad, dtype) for dtype in (torch.float32, torch.float64))
        for one in zip(found, eager, truth, strict=True):
            assert_within_bound(f"{rows} {width} {columns}", *one)


@pytest.mark.parametrize("shape", [(70, 300), (2, 70, 300)])
def test_the_result_may_be_written_into(shape):
    tensors = leaves(shape, (257, 300), (257,))
    y = linear(*tensors)
    wanted = y.relu(), *torch.autograd.grad(y.relu().sum(), tensors)
    y = linear(*tensors).relu_()
    found = y, *torch.autograd.grad(y.sum(), tensors)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_second_derivatives():
    tensors = leaves((70, 300), (257, 300), (257,))

    def run(function, dtype):
        copies = [t.detach().to(dtype).requires_grad_() for t in tensors]
        grads = torch.autograd.grad(function(*copies).square().sum(), copies, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), copies)

    results = (
        run(linear, torch.float32),
        run(functional.linear, torch.float32),
        run(functional.linear, torch.float64),
    )
    for name, *one in zip(("x", "weight", "bias"), *results, strict=True):
        assert_within_bound(name, *one)


def taken(x, weight, bias=None):
    return linear_in_training(x, weight, bias) is not None


def test_where_it_is_taken(monkeypatch):
    x, weight, bias = leaves((70, 300), (257, 300), (257,))
    assert taken(x, weight, bias)
    assert taken(x.detach(), weight)
    assert taken(torch.nn.Parameter(x.detach()), torch.nn.Parameter(weight.detach()))
    assert not taken(x.detach(), weight.detach(), bias)
    assert not taken(x[:63], weight)
    assert not taken(x, weight[:200])
    assert not taken(x, leaves((300, 257))[0].t())
    assert not taken(x.double(), weight.double())
    assert not taken(x.bfloat16(), weight.bfloat16())
    assert not taken(x, weight, bias[:5])
    contexts = (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        dispatch.use_backend("reference"),
        FlopCounterMode(display=False),
        torch.backends.mkldnn.flags(enabled=False),
        torch.autograd.forward_ad.dual_level(),
    )
    for context in contexts:
        with context:
            assert not taken(x, weight, bias)
    with dispatch.use_backend("cpu"):
        assert taken(x, weight, bias)
    monkeypatch.setattr(linear_training, "_pays", lambda: False)
    assert not taken(x, weight, bias)


def test_functional_transforms_and_compilers_do_not_see_it():
    x, weight = leaves((70, 300), (257, 300))

    def loss(weight):
        return linear(x, weight).square().sum()

    expected = torch.autograd.grad(functional.linear(x, weight).square().sum(), weight)[0]
    torch.testing.assert_close(torch.func.grad(loss)(weight), expected)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(weight), weight)[0], expected)


def test_what_looks_on_at_the_backward_alone_sees_torchs_products():
    tensors = leaves((70, 300), (257, 300), (257,))
    ones = torch.ones(70, 257)
    eager, truth = (plain(tensors, ones, dtype) for dtype in (torch.float32, torch.float64))
    counts = []
    for function in (linear, functional.linear):
        y = function(*tensors)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(y, tensors, ones, retain_graph=True)
        counts.append(counter.get_total_flops())
        both = torch.stack([ones, torch.zeros_like(ones)])
        batch = torch.autograd.grad(y, tensors, both, is_grads_batched=True)
        for (one, zero), other, true in zip(batch, eager[1:], truth[1:], strict=True):
            assert_within_bound("a gradient of a batch", one, other, true)
            assert not zero.any()
    assert counts[0] == counts[1] == 2 * 2 * 70 * 257 * 300


def test_errors_are_torch_s():
    x, weight, bias = leaves((70, 300), (257, 300), (5,))
    with pytest.raises(RuntimeError, match="size"):
        linear(x, weight, bias)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x[:, :30], weight)
    for args, named in (((None, weight), "input"), ((x, None), "weight"), ((x, weight, 1), "bias")):
        with pytest.raises(TypeError, match=f"argument '{named}' .* must be Tensor"):
            linear(*args)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_holds_the_logits_of_one_chunk(reduction, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_TOKENS", 70)
    made, held = [], []

    def observed(*args):
        held.append(sum(one() is not None for one in made))
        result = product(*args)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(linear_cross_entropy, "product", observed)
    x, weight = leaves((210, 300), (257, 300))
    x.requires_grad_(False)  # so that all products are logits
    target = torch.randint(257, (210,))
    loss = linear_cross_entropy.linear_cross_entropy(x, weight, target, reduction=reduction)
    loss.sum().backward()
    assert held == [0] * (3 if reduction == "mean" else 6)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every other", "expanded"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_cross_entropy(layout, reduction, biased, monkeypatch):
    """In two chunks, the second shorter."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_TOKENS", 65)
    calls = []
    monkeypatch.setattr(
        linear_cross_entropy, "product", lambda *args: calls.append(args) or product(*args)
    )
    torch.manual_seed(0)
    x = matrix(layout, 129, 300).requires_grad_()
    weight = matrix("transposed" if layout == "transposed" else "contiguous", 257, 300) / 300**0.5
    tensors = [x, weight.requires_grad_(), *leaves((257,))[: int(biased)]]
    target = torch.randint(257, (129,))
    grad = torch.rand(129 if reduction == "none" else ())

    def run(function, tensors):
        loss = function(*tensors)
        return loss.detach(), *torch.autograd.grad(loss, tensors, grad.to(loss.dtype))

    def eager(*tensors):
        return functional.cross_entropy(functional.linear(*tensors), target, reduction=reduction)

    def ours(x, weight, bias=None):
        return linear_cross_entropy.linear_cross_entropy(
            x, weight, target, linear_bias=bias, reduction=reduction
        )

    truth = run(eager, [t.detach().double().requires_grad_() for t in tensors])
    for one, other, true in zip(run(ours, tensors), run(eager, tensors), truth, strict=True):
        assert_within_bound("loss or gradient", one, other, true)
    assert len(calls) == (4 if reduction == "mean" else 6)
