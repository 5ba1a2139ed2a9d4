"""Norms, dropout and losses as modules, beside torch's."""

import pytest
import torch
from nn_cases import assert_agree, twins
from torch.nn import functional

import fusedformer

pytestmark = pytest.mark.usefixtures("on_device")

nn = fusedformer.nn
DTYPES = [torch.float32, torch.bfloat16]


# --- Norms and dropout ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalized", [96, (96,), (4, 24)])
@pytest.mark.parametrize("affine", [True, False, "no bias"])
def test_layer_norm(dtype, normalized, affine):
    options = {"eps": 1e-3, "elementwise_affine": bool(affine), "bias": affine is True}
    ours, theirs = twins(
        nn.LayerNorm(normalized, **options), torch.nn.LayerNorm(normalized, **options), dtype
    )
    shape = (5, 7, *ours.normalized_shape)
    assert_agree(ours, theirs, lambda m, x: m(x), {"x": torch.randn(shape, dtype=dtype)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalized", [96, (4, 24)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [None, 1e-2])
def test_rms_norm(dtype, normalized, affine, eps):
    options = {"eps": eps, "elementwise_affine": affine}
    ours, theirs = twins(
        nn.RMSNorm(normalized, **options), torch.nn.RMSNorm(normalized, **options), dtype
    )
    shape = (5, 7, *ours.normalized_shape)
    # Small enough for the eps that None stands for to count.
    x = torch.randn(shape).mul(1e-3).to(dtype)
    if eps is None:
        theirs.eps = torch.finfo(torch.float32).eps  # of the float64 truth, too
    assert_agree(ours, theirs, lambda m, x: m(x), {"x": x})
    if eps is None:
        theirs.eps = None
        torch.testing.assert_close(ours(x), theirs(x))


def test_rms_norm_in_float64_has_its_eps():
    x = torch.full((1, 4), 1e-8, dtype=torch.float64)
    expected = torch.nn.RMSNorm(4, dtype=torch.float64)(x)
    torch.testing.assert_close(nn.RMSNorm(4, dtype=torch.float64)(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalized", [96, (4, 24)])
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_add_layer_norm(dtype, normalized, prenorm, p):
    """At p = 1 nothing is left of x, so that torch's modules are exact twins there, too."""
    ours = nn.DropoutAddLayerNorm(normalized, p, prenorm=prenorm)
    ours, theirs = twins(ours, torch.nn.LayerNorm(normalized), dtype)

    def call(module, x, residual):
        if module is ours:
            return module(x, residual)
        z = residual + functional.dropout(x, p)
        return (module(z), z) if prenorm else module(z)

    shape = (5, 7, *ours.normalized_shape)
    inputs = {name: torch.randn(shape, dtype=dtype) for name in ("x", "residual")}
    assert_agree(ours, theirs, call, inputs, terms=1.0)
    assert f"p={p}, prenorm={prenorm}" in repr(ours)


def test_dropout_add_layer_norm_drops_in_training_alone():
    module = nn.DropoutAddLayerNorm(64, 0.5, prenorm=True)
    x, residual = torch.randn(2, 100, 64)
    _, z = module(x, residual)
    dropped = z == residual
    assert 0.4 < dropped.double().mean() < 0.6
    torch.testing.assert_close(z[~dropped], (residual + 2 * x)[~dropped])
    torch.testing.assert_close(module.eval()(x, residual)[1], residual + x)
    torch.testing.assert_close(module(x)[1], x)


def test_dropout():
    module = nn.Dropout(0.25)
    x = torch.randn(200, 64)
    y = module(x)
    assert 0.2 < (y == 0).double().mean() < 0.3
    torch.testing.assert_close(y[y != 0], x[y != 0] / 0.75)
    assert torch.equal(module.eval()(x), x)


def test_modules_are_torchs():
    """Code that looks for torch's classes, to set p or leave norms without decay, finds ours."""
    for name in ("Dropout", "LayerNorm", "RMSNorm", "MultiheadAttention", "CrossEntropyLoss"):
        assert issubclass(getattr(nn, name), getattr(torch.nn, name))
    assert issubclass(nn.DropoutAddLayerNorm, torch.nn.LayerNorm)
    # Compared as fusedformer.__all__ is: what is public is listed.
    public = {name for name in vars(nn) if name[0].isupper()}
    assert public == set(nn.__all__)


# --- Losses ---------------------------------------------------------------------------------------

CLASSES = 50


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (40,), (6, 9), (CLASSES, CLASSES), (2, 3, 4)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"weight": True, "label_smoothing": 0.1}])
def test_cross_entropy_loss(dtype, shape, reduction, options):
    if "weight" in options:
        options = options | {"weight": torch.rand(CLASSES)}
    ours, theirs = (
        cls(reduction=reduction, ignore_index=3, **options)
        for cls in (nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss)
    )
    ours, theirs = twins(ours, theirs, dtype)
    logits = torch.randn(*shape[:1], CLASSES, *shape[1:], dtype=dtype)
    target = torch.randint(CLASSES, shape)
    if shape:
        target.flatten()[::5] = 3

    assert_agree(ours, theirs, lambda m, logits: m(logits, target), {"logits": logits}, terms=1.0)


@pytest.mark.parametrize(
    ("input", "target", "error", "message"),
    [
        ((2, 5, 7), torch.zeros(2, 5).long(), ValueError, r"target must be \(2, 7\) for an input"),
        ((2, 5), torch.zeros(2, 5), TypeError, "class probabilities are not supported"),
        ((2, 5), torch.zeros(3).long(), ValueError, r"target must be \(2,\)"),
    ],
)
def test_cross_entropy_loss_errors(input, target, error, message):
    with pytest.raises(error, match=message):
        nn.CrossEntropyLoss()(torch.randn(input), target)


class Plain(torch.nn.Module):
    """torch 2.13's LinearCrossEntropyLoss, of which earlier releases have only the parts."""

    def __init__(self, bias: bool, **options) -> None:
        super().__init__()
        self.register_buffer("weight", options["weight"])
        self.linear = torch.nn.Linear(24, CLASSES, bias)
        self.options = options

    def forward(self, input, target):
        logits = self.linear(input).flatten(0, -2)
        options = self.options | {"weight": self.weight}
        loss = functional.cross_entropy(logits, target.flatten(), **options)
        return loss.view(target.shape) if loss.dim() else loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [{}, {"ignore_index": 3, "label_smoothing": 0.1}])
def test_linear_cross_entropy_loss(dtype, bias, reduction, options):
    options = options | {"weight": torch.rand(CLASSES) if options else None, "reduction": reduction}
    ours = nn.LinearCrossEntropyLoss(24, CLASSES, bias=bias, **options)
    ours, theirs = twins(ours, Plain(bias, **options), dtype)
    target = torch.randint(CLASSES, (4, 25))
    target[0, ::5] = 3
    inputs = {"input": torch.randn(4, 25, 24, dtype=dtype)}
    assert_agree(ours, theirs, lambda m, input: m(input, target), inputs)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch < 2.13")
def test_linear_cross_entropy_loss_has_the_state_of_torchs():
    options = {"bias": True, "weight": torch.rand(5)}
    ours, theirs = (m.LinearCrossEntropyLoss(3, 5, **options) for m in (nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    input, target = torch.randn(7, 3), torch.tensor([0, 1, 2, 3, 4, -100, 0])
    torch.testing.assert_close(ours(input, target), theirs(input, target))


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.Dropout(1.5), ValueError, "Dropout: p must be from 0 to 1; got 1.5"),
        (lambda: nn.Dropout(0.1, inplace=True), ValueError, "Dropout: inplace must be False"),
        (lambda: nn.DropoutAddLayerNorm(4, -1), ValueError, "DropoutAddLayerNorm: p must be from"),
        (
            lambda: nn.LayerNorm((2, 4))(torch.randn(2, 5)),
            ValueError,
            r"LayerNorm: input must end in \(2, 4\), the normalized_shape; got \(2, 5\)",
        ),
        (
            lambda: nn.RMSNorm(4, elementwise_affine=False)(torch.randn(2, 5)),
            ValueError,
            r"RMSNorm: input must end in \(4,\)",
        ),
        (
            lambda: nn.DropoutAddLayerNorm(4)(torch.randn(3, 4), torch.randn(2, 4)),
            ValueError,
            r"residual must be \(3, 4\), as x is \(3, 4\); got \(2, 4\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
