"""bias_activation: every pair of backends against float64, its masks, and what surrounds it."""

import pytest
import torch
from backends import ONE_BACKEND
from backends import ROW_BACKENDS as BACKENDS
from bounds import assert_within_bound
from layouts import LAYOUTS, matrix
from pairwise import describe, pairwise
from torch.nn import functional

import fusedformer
from fusedformer.kernels import rng
from fusedformer.kernels.activation import ACTIVATIONS

bias_activation = fusedformer.bias_activation
OPS = torch.ops.fusedformer
SEED = 2**40 + 11

# What torch has for each activation.
TORCH = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}

# (70, 1024): more tiles of rows than programs in the backward, so that each takes several.
CASES = pairwise(
    {
        "dtype": [torch.float32, torch.float16],
        "size": [(1, 1), (37, 1), (199, 17), (37, 63), (5, 760), (3, 1000), (2, 3001), (70, 1024)],
        "bias": [None, torch.float32, torch.float16],
        "activation": list(ACTIVATIONS),
        "p": [0.0, 0.1, 0.5],
        "layout": LAYOUTS,
        "grad": ["contiguous", "transposed", "one number"],
    }
)


# The interpreter computes in NumPy, which speaks of overflows that are meant.
pytestmark = [
    pytest.mark.usefixtures("on_device", "poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


def plain(case, x, bias, grad, dtype=None):
    """Output and gradients by PyTorch's own functions, in dtype or in those of the tensors."""
    x, bias = (
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, bias)
    )
    out = TORCH[case["activation"]](x if bias is None else x + bias)
    if case["p"]:
        seed = torch.tensor(SEED, device=x.device)
        rows = x.numel() // x.shape[-1]
        keep = rng.rows_keep(seed, case["p"], rows, x.shape[-1], rng.BIAS_ACTIVATION)
        out = out * keep.view(x.shape) / (1 - case["p"])
    out = out.to(x.dtype)
    inputs = [t for t in (x, bias) if t is not None]
    return out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))


def check_pairs(case, device="cpu", backends=BACKENDS):
    """The forward of each backend, and the backward of each, against float64."""
    torch.manual_seed(0)
    kind = {"dtype": case["dtype"], "device": device}
    x = matrix(case["layout"], *case["size"], **kind) * 2
    bias = None
    if case["bias"] is not None:
        bias = torch.randn(x.shape[-1], dtype=case["bias"], device=device)
    grad = torch.randn(x.shape, **kind)
    if case["grad"] == "transposed":
        grad = torch.randn(x.transpose(0, -1).shape, **kind).transpose(0, -1)
    elif case["grad"] == "one number":
        grad = torch.randn((), **kind).expand(x.shape)
    truth = plain(case, x, bias, grad, torch.float64)
    eager = plain(case, x, bias, grad)
    seed = torch.tensor(SEED, device=device) if case["p"] else None
    args = (x, bias, seed, case["activation"], case["p"])
    for backend in backends:
        out = OPS.bias_activation_fwd(*args, backend)
        grad_x, grad_bias = OPS.bias_activation_bwd(grad, *args, bias is not None, backend)
        found = (out, grad_x) if bias is None else (out, grad_x, grad_bias)
        for name, tensor, eager_one, true in zip(
            ("out", "grad_x", "grad_bias"), found, eager, truth, strict=False
        ):
            assert tensor.dtype == eager_one.dtype
            assert tensor.is_contiguous()
            assert_within_bound(f"{name} of {backend}", tensor, eager_one, true)


# The covering set is whole only with the slow part.
@pytest.mark.parametrize("case", CASES[::4], ids=describe)
def test_backends(case):
    check_pairs(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for n, c in enumerate(CASES) if n % 4], ids=describe)
def test_backends_rest(case):
    check_pairs(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=describe)
def test_backends_gpu(case, dtype):
    check_pairs({**case, "dtype": dtype}, "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_torch(backend, activation):
    x = torch.linspace(-30, 30, 600).view(3, -1).requires_grad_()
    out = bias_activation(x, None, activation, backend=backend)
    expected = TORCH[activation](x)
    torch.testing.assert_close(out, expected)
    found, wanted = (torch.autograd.grad(t.sum(), x)[0] for t in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_values(backend, activation):
    x = torch.tensor([[-1e30, -1e15, -1e4, 1e4, 1e15]]).requires_grad_()
    out = bias_activation(x, None, activation, backend=backend)
    torch.testing.assert_close(out, x.detach().relu())
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0][:, 1:], (x > 0).float()[:, 1:])


# --- Dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 5), (40, 33), (9, 300), (2, 4100)])
def test_masks_are_those_of_the_contract(size):
    seed = torch.tensor(-77)
    keep = rng.rows_keep(seed, 0.3, *size, rng.BIAS_ACTIVATION)
    x = torch.ones(size)
    for backend in BACKENDS:
        out = OPS.bias_activation_fwd(x, None, seed, "relu", 0.3, backend)
        assert torch.equal(out != 0, keep)
        grad, _ = OPS.bias_activation_bwd(x, x, None, seed, "relu", 0.3, False, backend)
        assert torch.equal(grad != 0, keep)
        assert out.max() == torch.tensor(1 / 0.7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_elements_are_zero_whatever_they_held(backend):
    x = torch.full((8, 40), torch.inf)
    out = bias_activation(x, None, "relu", 0.5, seed=3, backend=backend)
    assert torch.equal(out == 0, ~rng.rows_keep(torch.tensor(3), 0.5, 8, 40, rng.BIAS_ACTIVATION))


@pytest.mark.parametrize("backend", BACKENDS)
def test_probability_zero_and_one(backend):
    x = torch.randn(4, 20, requires_grad=True)
    bias = torch.randn(20, requires_grad=True)
    assert torch.equal(
        bias_activation(x, bias, dropout_p=0.0, seed=1, backend=backend),
        bias_activation(x, bias, backend=backend),
    )
    out = bias_activation(x, bias, dropout_p=1.0, backend=backend)
    grads = torch.autograd.grad(out.sum(), (x, bias))
    assert not out.any()
    assert not grads[0].any()
    assert not grads[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_seeds(backend):
    x = torch.randn(8, 64)

    def run(seed=None):
        return bias_activation(x, None, "silu", 0.5, seed=seed, backend=backend)

    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)
    assert torch.equal(run(9), run(torch.tensor(9)))
    assert not torch.equal(run(9), run(10))


def test_checkpoint_replays_the_mask():
    x = torch.randn(8, 64, requires_grad=True)

    def run(x):
        return bias_activation(x, None, "gelu", 0.5)

    torch.manual_seed(1)
    expected = torch.autograd.grad(run(x).sum(), x)[0]
    torch.manual_seed(1)
    out = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected)


# --- What surrounds the op ------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(activation, p):
    torch.use_deterministic_algorithms(False)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, bias: bias_activation(x, bias, activation, p, seed=4), (x, bias)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)])
def test_empty(backend, shape):
    x = torch.randn(shape, requires_grad=True)
    bias = torch.randn(shape[-1], requires_grad=True)
    out = bias_activation(x, bias, backend=backend)
    assert out.shape == shape
    assert not torch.autograd.grad(out.sum(), bias)[0].any()


def test_opcheck():
    x, bias, seed = torch.randn(3, 20), torch.randn(20), torch.tensor(1)
    args = (x, bias, seed, "gelu", 0.2)
    for backend in BACKENDS:
        torch.library.opcheck(OPS.bias_activation_fwd.default, (*args, backend))
        torch.library.opcheck(OPS.bias_activation_bwd.default, (x, *args, True, backend))


@pytest.mark.parametrize("backend", ONE_BACKEND)
def test_compile_with_dynamic_shapes(backend):
    bias = torch.randn(24, requires_grad=True)

    def run(x, bias):
        return bias_activation(x, bias, "gelu_tanh", 0.25, seed=6, backend=backend) * 2

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5, 8):
        x = torch.randn(2, rows, 24, requires_grad=True)
        found, expected = compiled(x, bias), run(x, bias)
        assert torch.equal(found, expected)
        grads = (torch.autograd.grad(t.sum(), (x, bias)) for t in (found, expected))
        for found, expected in zip(*grads, strict=True):
            assert torch.equal(found, expected)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x, bias):
            return bias_activation(x, bias, "silu", 0.5)

    x, bias = torch.randn(6, 24), torch.randn(24)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Module(), (x, bias), dynamic_shapes=({0: rows}, None))
    torch.manual_seed(3)
    found = program.module()(torch.ones(9, 24), bias)
    torch.manual_seed(3)
    assert torch.equal(found, bias_activation(torch.ones(9, 24), bias, "silu", 0.5))


def test_autocast_keeps_dtypes():
    with torch.autocast("cpu", torch.bfloat16):
        assert bias_activation(torch.randn(3, 8), torch.randn(8)).dtype == torch.float32


X = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("args", "error", "said"),
    [
        ((None,), TypeError, "x must be a tensor"),
        ((X.int(),), TypeError, "x must be float32"),
        ((X.sum(),), ValueError, "x must have at least one dimension"),
        ((X, torch.zeros(3)), ValueError, r"bias must be \(4,\).*\(3,\)"),
        ((X, torch.zeros(4, dtype=torch.int64)), TypeError, "bias must be float32"),
        ((X, torch.zeros(4, dtype=torch.float64)), TypeError, "float64 bias"),
        ((X, torch.zeros(4, device="meta")), ValueError, "bias must be on the device of x"),
        ((X, None, "tanh"), ValueError, "activation must be one of.*'tanh'"),
        ((X, None, "gelu", -0.1), ValueError, "dropout_p must be from 0 to 1"),
        ((X, None, "gelu", 1.1), ValueError, "dropout_p must be from 0 to 1"),
        ((X, None, "gelu", "x"), TypeError, "dropout_p must be a number"),
    ],
)
def test_bad_arguments(args, error, said):
    with pytest.raises(error, match=said):
        bias_activation(*args)


def test_bad_seed_and_backend():
    with pytest.raises(TypeError, match="seed must be"):
        bias_activation(X, dropout_p=0.5, seed=1.5)
    with pytest.raises(ValueError, match="backend must be one of"):
        bias_activation(X, backend="fast")
    with pytest.raises(RuntimeError, match="float64"):
        bias_activation(X.double(), backend="triton")
