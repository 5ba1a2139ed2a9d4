"""cross_entropy: every pair of backends against float64, equality with torch's, bad targets."""

import pytest
import torch
from backends import ONE_BACKEND
from backends import ROW_BACKENDS as BACKENDS
from bounds import assert_within_bound
from cross_entropy_cases import IGNORED, plain_losses, targets
from layouts import LAYOUTS, matrix
from pairwise import describe, pairwise
from torch.nn import functional

import fusedformer
from fusedformer.kernels import native, reference
from fusedformer.kernels.triton import cross_entropy as on_triton

cross_entropy = fusedformer.cross_entropy
OPS = torch.ops.fusedformer
MODULES = [reference, on_triton, native][: len(BACKENDS)]

# Classes of one tile with several rows and with one, at its edge and past it, of several blocks
# that end on a boundary or not; rows that fill no tile, or many.
CASES = pairwise(
    {
        "dtype": [torch.float32, torch.float16],
        "size": [
            (1, 1), (300, 7), (37, 63), (5, 1000), (3, 4096), (3, 4097), (2, 8192), (3, 16391),
            (2, 32000), (2, 32001),
        ],
        "layout": LAYOUTS[:-1],
        "weight": [None, torch.float32, torch.float16],
        "smoothing": [0.0, 0.1, 1.0],
        "target": [torch.int64, torch.int32],
        # Large logits, whose sums would cancel.
        "offset": [0.0, 300.0],
        "grad": ["vector", "every other", "one number"],
    }
)  # fmt: skip


# The interpreter computes in NumPy, which speaks of what happens in rows outside the tensor.
pytestmark = [
    pytest.mark.usefixtures("on_device", "poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


def check_pairs(case, device="cpu", backends=BACKENDS):
    """The forward of each backend with the backward of each, against float64."""
    torch.manual_seed(0)
    rows, classes = case["size"]
    kind = {"dtype": case["dtype"], "device": device}
    x = matrix(case["layout"], rows, classes, **kind)
    # In place where that can be: a sum has a layout of its own.
    x = x + case["offset"] if case["layout"] == "expanded" else x.add_(case["offset"])
    target = targets(rows, classes, case["target"], device)
    smoothing = case["smoothing"]
    weight = None
    if case["weight"] is not None:
        weight = torch.rand(classes, dtype=case["weight"], device=device) + 0.5
    grad = torch.rand(2 * rows, device=device)[:: 2 if case["grad"] == "every other" else 1][:rows]
    if case["grad"] == "one number":
        grad = torch.rand((), device=device).expand(rows)

    def plain(dtype):
        logits = x.detach().to(dtype).requires_grad_()
        losses = plain_losses(logits, target, weight, smoothing)
        return losses.detach(), torch.autograd.grad(losses, logits, grad.to(dtype))[0]

    truth, eager = plain(torch.float64), plain(case["dtype"])
    # What cancels in a loss over one class, and in its gradient.
    terms = float(grad.abs().max()) * 4
    args = (x, target, weight, IGNORED, smoothing)
    for forward in backends:
        losses, row_weights, lse = OPS.cross_entropy_fwd(*args, forward)
        assert losses.dtype == row_weights.dtype == lse.dtype == torch.float32
        assert_within_bound(f"losses of {forward}", losses, eager[0], truth[0])
        expected = torch.ones(classes, device=device) if weight is None else weight.float()
        expected = expected[target.clamp(0).long()].masked_fill(target == IGNORED, 0)
        assert torch.equal(row_weights, expected)
        for backward in backends:
            found = OPS.cross_entropy_bwd(grad, lse, *args, backward)
            assert found.dtype == x.dtype
            assert found.is_contiguous()
            what = f"gradient, {forward} then {backward}"
            assert_within_bound(what, found, eager[1], truth[1], terms)


# The covering set is whole only with the slow part.
@pytest.mark.parametrize("case", CASES[::5], ids=describe)
def test_backend_pairs(case):
    check_pairs(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for n, c in enumerate(CASES) if n % 5], ids=describe)
def test_backend_pairs_rest(case):
    check_pairs(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=describe)
def test_backend_pairs_gpu(case, dtype):
    check_pairs({**case, "dtype": dtype}, "cuda")


# 8189: the last block ends less than an access past the row.
@pytest.mark.parametrize("classes", [63, 1000, 4097, 8189, 8192])
@pytest.mark.parametrize("pitch", [0, 64])
def test_gradient_over_the_logits(classes, pitch):
    buffer = torch.randn(6, classes + pitch)
    target, grad = targets(6, classes, torch.int64), torch.rand(6)
    logits = buffer[:, :classes].clone()
    args = (target, None, IGNORED, 0.1)
    lse = logits.logsumexp(1)
    expected = reference.cross_entropy_bwd(grad, lse, logits, *args)
    kept = buffer[:, classes:].clone()
    for module in MODULES:
        place = buffer.clone()
        found = module.cross_entropy_bwd(grad, lse, place[:, :classes], *args, True)
        assert found.data_ptr() == place.data_ptr()
        torch.testing.assert_close(place[:, :classes], expected)
        assert torch.equal(place[:, classes:], kept)


@pytest.mark.parametrize("classes", [100, 5000])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_of_large_logits(classes, smoothing):
    torch.manual_seed(0)
    x = torch.randn(9, classes) + 1000
    target = targets(9, classes, torch.int64)
    options = {"ignore_index": IGNORED, "reduction": "none", "label_smoothing": smoothing}
    truth = functional.cross_entropy(x.double(), target, **options)
    eager = functional.cross_entropy(x, target, **options)
    for backend in BACKENDS:
        losses, _, _ = OPS.cross_entropy_fwd(x, target, None, IGNORED, smoothing, backend)
        assert_within_bound(f"losses of {backend}", losses, eager, truth)


# --- As torch's -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_torch(backend, reduction, weighted, smoothing):
    for size in ((9,), (12, 9), (2, 9, 4), (2, 9, 3, 4), (0, 9)):
        x = torch.randn(size, requires_grad=True)
        target = torch.randint(0, 9, size[:1] + size[2:] if len(size) > 1 else ())
        if len(size) == 2:
            target[:3] = IGNORED
        weight = torch.rand(9) if weighted else None
        options = {
            "ignore_index": IGNORED,
            "reduction": reduction,
            "label_smoothing": smoothing,
        }
        expected = functional.cross_entropy(x, target, weight, **options)
        found = cross_entropy(x, target, weight, **options, backend=backend)
        torch.testing.assert_close(found, expected, equal_nan=True)
        grads = (torch.autograd.grad((t * 3).sum(), x)[0] for t in (found, expected))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_last(backend):
    x, target = torch.randn(2, 4, 9), torch.randint(0, 9, (2, 4))
    found = cross_entropy(x, target, reduction="none", backend=backend)
    expected = functional.cross_entropy(x.flatten(0, 1), target.flatten(), reduction="none")
    torch.testing.assert_close(found, expected.view(2, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_all_ignored(backend, smoothing):
    x = torch.randn(4, 9, requires_grad=True)
    target = torch.full((4,), -100)
    run = {"label_smoothing": smoothing, "backend": backend}
    loss = cross_entropy(x, target, **run)
    assert loss.isnan()
    assert not torch.autograd.grad(loss, x)[0].any()
    assert cross_entropy(x, target, reduction="sum", **run) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_may_hold_anything(backend):
    x = torch.randn(4, 9)
    x[1] = torch.nan
    x.requires_grad_()
    target = torch.tensor([1, -100, 2, 3])
    loss = cross_entropy(x, target, label_smoothing=0.1, backend=backend)
    grad = torch.autograd.grad(loss, x)[0]
    assert not grad[1].any()
    rest = cross_entropy(x[[0, 2, 3]], target[[0, 2, 3]], label_smoothing=0.1)
    torch.testing.assert_close(loss, rest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [9, 5000])
def test_infinite_logits(backend, classes):
    x = torch.randn(5, classes)
    x[0, 2:] = x[1, 3] = -torch.inf
    x[2] = -torch.inf
    x[3, 5] = torch.inf
    x[4, 1] = torch.nan
    target = torch.tensor([1, 3, 0, 0, 0])
    found = cross_entropy(x, target, reduction="none", backend=backend)
    expected = functional.cross_entropy(x, target, reduction="none")
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert cross_entropy(x[1:2], target[1:2], label_smoothing=0.5, backend=backend) == torch.inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_class_index(backend):
    # An ignore_index that is itself a class.
    x, target = torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 4, 3])
    found = cross_entropy(x, target, ignore_index=0, backend=backend)
    torch.testing.assert_close(found, functional.cross_entropy(x, target, ignore_index=0))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("classes", [7, 5000])
def test_bad_targets_beyond_the_check_give_nan(module, classes):
    # As on a GPU, where no one looks at the values.
    x, target = torch.randn(4, classes), torch.tensor([classes, -1, 2, -100])
    losses, row_weights, lse = module.cross_entropy_fwd(x, target, None, -100, 0.1)
    assert losses.isnan().tolist() == [True, True, False, False]
    assert row_weights.tolist() == [0, 0, 1, 0]
    grad = module.cross_entropy_bwd(torch.ones(4), lse, x, target, None, -100, 0.1)
    assert grad[:2].isnan().all()
    assert not grad[2:].isnan().any()


# --- What surrounds the op ------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(reduction, smoothing):
    torch.use_deterministic_algorithms(False)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 4, -100, 2])
    weight = torch.rand(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: cross_entropy(x, target, weight, reduction=reduction, label_smoothing=smoothing),
        x,
    )


def test_opcheck():
    x, target, weight = torch.randn(3, 20), torch.tensor([1, 2, 3]), torch.rand(20)
    args = (x, target, weight, -100, 0.1)
    for backend in BACKENDS:
        torch.library.opcheck(OPS.cross_entropy_fwd.default, (*args, backend))
        lse = x.logsumexp(1)
        torch.library.opcheck(OPS.cross_entropy_bwd.default, (torch.rand(3), lse, *args, backend))


@pytest.mark.parametrize("backend", ONE_BACKEND)
def test_compile_with_dynamic_shapes(backend):
    def run(x, target):
        return cross_entropy(x * 2, target, label_smoothing=0.1, backend=backend)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, classes in ((3, 50), (5, 60), (8, 70)):
        x = torch.randn(rows, classes, requires_grad=True)
        target = torch.randint(0, classes, (rows,))
        found, expected = compiled(x, target), run(x, target)
        torch.testing.assert_close(found, expected)
        grads = (torch.autograd.grad(t, x)[0] for t in (found, expected))
        torch.testing.assert_close(*grads)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x, target):
            return cross_entropy(x, target)

    x, target = torch.randn(6, 24), torch.randint(0, 24, (6,))
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Module(), (x, target), dynamic_shapes=({0: rows}, {0: rows}))
    x, target = torch.randn(9, 24), torch.randint(0, 24, (9,))
    torch.testing.assert_close(program.module()(x, target), functional.cross_entropy(x, target))


def test_dtype_of_the_loss_is_that_of_torch():
    target = torch.tensor([1, 2])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(2, 5, dtype=dtype)
        assert cross_entropy(x, target).dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            expected = functional.cross_entropy(x, target).dtype
            assert cross_entropy(x, target).dtype == expected


def test_logits_are_not_overwritten_and_the_graph_may_be_used_twice():
    x = torch.randn(3, 5000, requires_grad=True)
    before = x.detach().clone()
    loss = cross_entropy(x, torch.tensor([1, 2, 3]), backend="triton")
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, x)[0], first)
    assert torch.equal(x, before)


X, T = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "options", "error", "said"),
    [
        ((None, T), {}, TypeError, "input must be a tensor"),
        ((X.int(), T), {}, TypeError, "input must be float32"),
        ((X.sum(), T[0]), {}, ValueError, "dimension of classes"),
        ((X[:, :0], T), {}, ValueError, "at least one class"),
        ((X, None), {}, TypeError, "target must be a tensor"),
        ((X, X), {}, ValueError, r"target must be \(2,\).*\(2, 4\)"),
        ((X, T.float()), {}, TypeError, "target must be class indices"),
        ((X, torch.zeros(3, dtype=torch.int64)), {}, ValueError, r"target must be \(2,\).*\(3,\)"),
        ((X, T.to("meta")), {}, ValueError, "target must be on the device of input"),
        ((X, T + 4), {}, ValueError, r"target must be from 0 to 3.*ignore_index \(-100\); got 4"),
        ((X, T - 1), {}, ValueError, "target must be from 0 to 3.*got -1"),
        ((X[None], T), {}, ValueError, r"\(1, 2\).*\(1, 4\)"),
        ((torch.zeros(2, 4, 4), torch.zeros(2, 4).long()), {}, ValueError, "flatten"),
        ((X, T, torch.zeros(3)), {}, ValueError, r"weight must be \(4,\).*\(3,\)"),
        ((X, T, torch.zeros(4).int()), {}, TypeError, "weight must be float32"),
        ((X, T, torch.zeros(4).double()), {}, TypeError, "float64 weight"),
        ((X, T, torch.zeros(4, requires_grad=True)), {}, ValueError, "weight must not require"),
        ((X, T), {"ignore_index": 1.5}, TypeError, "ignore_index must be an int"),
        ((X, T), {"reduction": "batchmean"}, ValueError, "reduction must be one of.*'batchmean'"),
        ((X, T), {"label_smoothing": 1.5}, ValueError, "label_smoothing must be from 0 to 1"),
        ((X, T), {"label_smoothing": None}, TypeError, "label_smoothing must be a number"),
        ((X, T), {"backend": "fast"}, ValueError, "backend must be one of"),
        ((X.double(), T), {"backend": "triton"}, RuntimeError, "float64"),
    ],
)  # fmt: skip
def test_bad_arguments(args, options, error, said):
    with pytest.raises(error, match=said):
        cross_entropy(*args, **options)
