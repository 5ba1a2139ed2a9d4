"""linear_cross_entropy: numbers against float64, equality with torch's, what surrounds it."""

import pytest
import torch
from backends import ONE_BACKEND
from backends import ROW_BACKENDS as BACKENDS
from bounds import assert_within_bound
from cross_entropy_cases import IGNORED, plain_losses, targets
from layouts import matrix
from pairwise import describe, pairwise
from torch.nn import functional

import fusedformer
from fusedformer.kernels import linear_cross_entropy as module

linear_cross_entropy = fusedformer.linear_cross_entropy
OPS = torch.ops.fusedformer

# Chunks of 16 tokens: one, several, and several with a shorter last one.
CHUNK = 16
CASES = pairwise(
    {
        "dtype": [torch.float32, torch.float16],
        "size": [(1, 1, 1), (16, 24, 100), (35, 16, 63), (70, 8, 1000), (19, 32, 4099)],
        "layout": ["contiguous", "transposed", "every other", "expanded"],
        "weight_layout": ["contiguous", "transposed"],
        "bias": [False, True],
        "weight": [None, torch.float32],
        "smoothing": [0.0, 0.1],
        "reduction": ["none", "mean", "sum"],
    }
)

pytestmark = [
    pytest.mark.usefixtures("on_device", "poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


@pytest.fixture
def _short_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_TOKENS", CHUNK)


def make_inputs(case, device="cpu"):
    torch.manual_seed(0)
    tokens, hidden, classes = case["size"]
    kind = {"dtype": case["dtype"], "device": device}
    x = matrix(case["layout"], tokens, hidden, **kind)
    linear_weight = matrix(case["weight_layout"], classes, hidden, **kind) / hidden**0.5
    bias = torch.randn(classes, **kind) if case["bias"] else None
    target = targets(tokens, classes, torch.int64, device)
    weight = None
    if case["weight"] is not None:
        weight = torch.rand(classes, dtype=case["weight"], device=device) + 0.5
    return x, linear_weight, bias, target, weight


def plain(case, x, linear_weight, bias, target, weight, grad, dtype):
    """Loss and gradients with the whole logits, in dtype throughout."""
    tensors = [
        None if t is None else t.detach().to(dtype).requires_grad_()
        for t in (x, linear_weight, bias)
    ]
    losses = plain_losses(functional.linear(*tensors), target, weight, case["smoothing"])
    if case["reduction"] != "none":
        losses = losses.sum()
    if case["reduction"] == "mean":
        counted = target != IGNORED
        losses = losses / (counted.sum() if weight is None else weight[target[counted]].sum())
    inputs = [t for t in tensors if t is not None]
    return losses.detach(), *torch.autograd.grad(losses, inputs, grad.to(losses.dtype))


def check(case, backends=BACKENDS, device="cpu"):
    x, linear_weight, bias, target, weight = make_inputs(case, device)
    grad = torch.rand(target.shape if case["reduction"] == "none" else (), device=device) * 3
    args = (x, linear_weight, bias, target, weight, grad)
    truth = plain(case, *args, torch.float64)
    eager = plain(case, *args, case["dtype"])
    names = ("loss", "grad_input", "grad_weight", "grad_bias")
    for backend in backends:
        inputs = [t.detach().requires_grad_() for t in (x, linear_weight, bias) if t is not None]
        loss = linear_cross_entropy(
            inputs[0], inputs[1], target, linear_bias=inputs[2] if bias is not None else None,
            weight=weight, ignore_index=IGNORED, reduction=case["reduction"],
            label_smoothing=case["smoothing"], backend=backend,
        )  # fmt: skip
        assert loss.dtype == x.dtype
        found = (loss, *torch.autograd.grad(loss, inputs, grad.to(loss.dtype)))
        for name, tensor, eager_one, true in zip(names, found, eager, truth, strict=False):
            # What cancels in the gradient of a loss over one class.
            terms = 4 * float(grad.max())
            assert tensor.dtype == x.dtype
            assert_within_bound(f"{name} of {backend}", tensor, eager_one, true, terms)


# The covering set is whole only with the slow part.
@pytest.mark.usefixtures("_short_chunks")
@pytest.mark.parametrize("case", CASES[::3], ids=describe)
def test_backends(case):
    check(case)


@pytest.mark.slow
@pytest.mark.usefixtures("_short_chunks")
@pytest.mark.parametrize("case", [c for n, c in enumerate(CASES) if n % 3], ids=describe)
def test_backends_rest(case):
    check(case)


@pytest.mark.usefixtures("_short_chunks")
@pytest.mark.parametrize("case", CASES, ids=describe)
def test_bfloat16(case):
    # Triton's interpreter cannot.
    check({**case, "dtype": torch.bfloat16}, [name for name in BACKENDS if name != "triton"])


@pytest.mark.gpu
@pytest.mark.usefixtures("_short_chunks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=describe)
def test_backends_gpu(case, dtype):
    check({**case, "dtype": dtype}, device="cuda")


@pytest.mark.usefixtures("_short_chunks")
def test_backend_pairs():
    """The forward of each backend with the backward of each, as reduction "none" has them."""
    case = {**CASES[0], "dtype": torch.float32, "size": (35, 16, 63), "reduction": "none"}
    case |= {"weight": torch.float32, "bias": True, "smoothing": 0.1}
    tensors = make_inputs(case)
    grad = torch.rand(35)
    truth = plain(case, *tensors, grad, torch.float64)
    eager = plain(case, *tensors, grad, torch.float32)
    args = (*tensors, IGNORED, 0.1)
    for forward in BACKENDS:
        _, _, lse, *_ = OPS.linear_cross_entropy_fwd(*args, [False] * 3, forward)
        for backward in BACKENDS:
            found = OPS.linear_cross_entropy_bwd(grad, lse, *args, [True] * 3, backward)
            for tensor, eager_one, true in zip(found, eager[1:], truth[1:], strict=True):
                assert_within_bound(f"{forward} then {backward}", tensor, eager_one, true)


@pytest.mark.usefixtures("_short_chunks")
def test_sums_over_many_chunks_lose_nothing():
    # 128 chunks that add the same to one row of the gradient: in bfloat16 a sum stops growing
    # where a chunk's share falls below half a unit of its last place.
    tokens, hidden = 128 * CHUNK, 4
    x = torch.ones(tokens, hidden, dtype=torch.bfloat16)
    linear_weight = torch.zeros(8, hidden, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(tokens, dtype=torch.int64)
    loss = linear_cross_entropy(x, linear_weight, target, reduction="sum")
    grad = torch.autograd.grad(loss, linear_weight)[0]
    expected = torch.full((8, hidden), tokens / 8)
    expected[0] -= tokens
    torch.testing.assert_close(grad.float(), expected, rtol=0, atol=0)


@pytest.mark.usefixtures("_short_chunks")
def test_small_gradients_survive_float16():
    # A mean over many tokens divides by more than float16 could hold of each token's gradient; a
    # loss scale undoes it.
    tokens = 2**14
    x = torch.ones(tokens, 1, dtype=torch.float16, requires_grad=True)
    linear_weight = torch.tensor([[0.0], [-8.0]], dtype=torch.float16, requires_grad=True)
    target = torch.zeros(tokens, dtype=torch.int64)
    loss = linear_cross_entropy(x, linear_weight, target)
    grad = torch.autograd.grad(loss.float() * 2.0**14, x)[0]
    share = torch.tensor([0.0, -8.0], dtype=torch.float64).softmax(0)[1]
    torch.testing.assert_close(grad.double(), (-8 * share).expand(tokens, 1), rtol=2e-3, atol=0)


# --- As torch's, and what surrounds the op --------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_equals_torch(backend, reduction):
    linear_weight, bias = torch.randn(9, 6, requires_grad=True), torch.randn(9, requires_grad=True)
    weight = torch.rand(9)
    for lead in ((), (5,), (2, 3), (0,)):
        x = torch.randn(*lead, 6, requires_grad=True)
        target = torch.randint(0, 9, lead)
        options = {"weight": weight, "reduction": reduction, "label_smoothing": 0.1}
        logits = functional.linear(x, linear_weight, bias)
        expected = functional.cross_entropy(logits.view(-1, 9), target.view(-1), **options)
        found = linear_cross_entropy(
            x, linear_weight, target, linear_bias=bias, **options, backend=backend
        )
        torch.testing.assert_close(found, expected.view(found.shape), equal_nan=True)
        grads = (torch.autograd.grad(t.sum(), (x, linear_weight, bias)) for t in (found, expected))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.skipif(
    not hasattr(functional, "linear_cross_entropy"), reason="torch has it from 2.13 on"
)
def test_names_are_those_of_torch():
    x, linear_weight, target = torch.randn(4, 6), torch.randn(9, 6), torch.tensor([1, -100, 3, 4])
    options = {
        "linear_bias": torch.randn(9), "weight": torch.rand(9), "ignore_index": -100,
        "reduction": "sum", "label_smoothing": 0.1,
    }  # fmt: skip
    expected = functional.linear_cross_entropy(x, linear_weight, target, **options)
    torch.testing.assert_close(linear_cross_entropy(x, linear_weight, target, **options), expected)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_all_ignored(reduction):
    x, linear_weight = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    loss = linear_cross_entropy(x, linear_weight, torch.full((4,), -100), reduction=reduction)
    assert loss.isnan() if reduction == "mean" else not loss.any()
    for grad in torch.autograd.grad(loss.sum(), (x, linear_weight)):
        assert not grad.any()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_graph_may_be_used_twice(reduction):
    x, linear_weight = torch.randn(4, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    loss = linear_cross_entropy(x, linear_weight, torch.arange(4), reduction=reduction).sum()
    first = torch.autograd.grad(loss, (x, linear_weight), torch.tensor(2.0), retain_graph=True)
    second = torch.autograd.grad(loss, (x, linear_weight), torch.tensor(4.0))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(2 * one, other)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_only_what_is_wanted(reduction):
    x, linear_weight, bias = torch.randn(4, 6), torch.randn(9, 6), torch.randn(9)
    for trained in (x, linear_weight, bias):
        trained.requires_grad_()
        loss = linear_cross_entropy(
            x, linear_weight, torch.arange(4), linear_bias=bias, reduction=reduction
        ).sum()
        logits = functional.linear(x, linear_weight, bias)
        expected = functional.cross_entropy(logits, torch.arange(4), reduction="sum")
        grads = (torch.autograd.grad(t, trained)[0] for t in (loss, expected))
        torch.testing.assert_close(*grads)
        trained.requires_grad_(False)
    assert not linear_cross_entropy(x, linear_weight, torch.arange(4)).requires_grad


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck(reduction):
    torch.use_deterministic_algorithms(False)
    x, linear_weight, bias = (
        torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((4, 3), (5, 3), 5)
    )
    target, weight = torch.tensor([0, 4, -100, 2]), torch.rand(5, dtype=torch.float64)

    def run(x, linear_weight, bias):
        return linear_cross_entropy(
            x, linear_weight, target, linear_bias=bias, weight=weight, reduction=reduction,
            label_smoothing=0.1,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, (x, linear_weight, bias))


def test_opcheck():
    x, linear_weight, bias = torch.randn(3, 6), torch.randn(20, 6), torch.randn(20)
    args = (x, linear_weight, bias, torch.tensor([1, 2, 3]), torch.rand(20), -100, 0.1)
    for backend in BACKENDS:
        for wanted in ([True, True, True], [False, True, False]):
            torch.library.opcheck(OPS.linear_cross_entropy_fwd.default, (*args, wanted, backend))
            torch.library.opcheck(
                OPS.linear_cross_entropy_bwd.default,
                (torch.rand(3), torch.rand(3) + 3, *args, wanted, backend),
            )
    torch.library.opcheck(
        OPS.linear_cross_entropy_scaled.default, (x, torch.tensor(2.0), torch.bfloat16)
    )


@pytest.mark.parametrize("backend", ONE_BACKEND)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compile_with_dynamic_shapes(backend, reduction):
    linear_weight = torch.randn(50, 6, requires_grad=True)

    def run(x, linear_weight, target):
        return linear_cross_entropy(
            x * 2, linear_weight, target, reduction=reduction, backend=backend
        )

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5, 8):
        x, target = torch.randn(rows, 6, requires_grad=True), torch.randint(0, 50, (rows,))
        found, expected = compiled(x, linear_weight, target), run(x, linear_weight, target)
        torch.testing.assert_close(found, expected)
        grads = (torch.autograd.grad(t.sum(), (x, linear_weight)) for t in (found, expected))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x, linear_weight, target):
            return linear_cross_entropy(x, linear_weight, target)

    def inputs(rows):
        return torch.randn(rows, 6), torch.randn(24, 6), torch.randint(0, 24, (rows,))

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Module(), inputs(5), dynamic_shapes=({0: rows}, None, {0: rows}))
    x, linear_weight, target = inputs(9)
    expected = functional.cross_entropy(x @ linear_weight.T, target)
    torch.testing.assert_close(program.module()(x, linear_weight, target), expected)


def test_autocast_is_that_of_a_linear_layer():
    x, linear_weight = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    target = torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(x, linear_weight, target)
        expected = functional.cross_entropy(functional.linear(x, linear_weight), target)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(t, (x, linear_weight)) for t in (found, expected))
    for one, other in zip(*grads, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-8)


X, W, T = torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "options", "error", "said"),
    [
        ((None, W, T), {}, TypeError, "input must be a tensor"),
        ((X, None, T), {}, TypeError, "linear_weight must be a tensor"),
        ((X, W.half(), T), {}, TypeError, "linear_weight must have the dtype of input"),
        ((X, W[:, :3], T), {}, ValueError, r"linear_weight must be \(V, H\).*\(5, 3\).*\(2, 4\)"),
        ((X, W[0], T), {}, ValueError, "linear_weight must be"),
        ((X, W[:0], T), {}, ValueError, "at least one class"),
        ((X, W, T[:1]), {}, ValueError, r"target must be \(2,\).*\(1,\)"),
        ((X, W, T.float()), {}, TypeError, "target must be class indices"),
        ((X, W, T + 5), {}, ValueError, "target must be from 0 to 4.*got 5"),
        ((X, W, T), {"linear_bias": W[0]}, ValueError, r"linear_bias must be \(5,\).*\(4,\)"),
        ((X, W, T), {"linear_bias": W[:, 0].half()}, TypeError, "linear_bias must have the dtype"),
        ((X, W, T), {"weight": W[0]}, ValueError, r"weight must be \(5,\)"),
        ((X, W, T), {"reduction": "all"}, ValueError, "reduction must be one of"),
        ((X, W, T), {"label_smoothing": -1}, ValueError, "label_smoothing must be from 0 to 1"),
        ((X, W, T), {"backend": "fast"}, ValueError, "backend must be one of"),
        ((X.double(), W.double(), T), {"backend": "triton"}, RuntimeError, "float64"),
    ],
)  # fmt: skip
def test_bad_arguments(args, options, error, said):
    with pytest.raises(error, match=said):
        linear_cross_entropy(*args, **options)
