"""Layer norm's numbers: every pair of backends against float64, and properties of the formula."""

import layer_norm_cases as cases
import pytest
import torch
from backends import ROW_BACKENDS as BACKENDS
from backends import pairs
from bounds import assert_within_bound
from pairwise import describe, met_by_all
from torch.nn import functional

import fusedformer
from fusedformer.kernels.triton import layer_norm as launchers

pytestmark = pytest.mark.usefixtures("on_device", "poisoned_memory")
OPS = torch.ops.fusedformer


def check_pairs(case: dict, backends: tuple[str, ...] = BACKENDS) -> None:
    """The forward of each backend with the backward of each, against float64."""
    tensors, grads = cases.make_inputs(case)
    truth = cases.run_plain(case, tensors, grads, double=True)
    eager = cases.run_plain(case, tensors, grads, double=False)
    x, residual, weight, bias = tensors.values()
    p, rms, prenorm = case["p"], case["is_rms_norm"], case["prenorm"]
    seed = torch.tensor(cases.SEED) if p else None
    dtype = cases.z_dtype(case)
    names = ("grad_x", "grad_residual", "grad_weight", "grad_bias")
    wanted = [tensor is not None for tensor in (residual, weight, bias)]
    met = pairs(cases.CASES.index(case) if case in cases.CASES else 0, backends)
    for forward in backends:
        y, z, mean, rstd = OPS.dropout_add_layer_norm_fwd(
            x, residual, weight, bias, seed, p, cases.eps(case), rms, prenorm, dtype, forward
        )
        assert (y.dtype, z.dtype, rstd.dtype) == (x.dtype, dtype, torch.float32)
        assert y.is_contiguous()
        assert z.is_contiguous()
        assert_within_bound(f"y of {forward}", y, eager["y"], truth["y"])
        if prenorm:
            assert_within_bound(f"z of {forward}", z, eager["z"], truth["z"])
        kept = (z, None) if prenorm else (x, residual)
        for backward in [second for first, second in met if first == forward]:
            found = OPS.dropout_add_layer_norm_bwd(
                *grads, *kept, weight, bias, seed, mean, rstd, p, rms, prenorm, dtype,
                *wanted, backward,
            )  # fmt: skip
            for name, grad, want in zip(names, found, (True, *wanted), strict=True):
                if not want:
                    assert not grad.numel(), name
                    continue
                what = f"{name}, {forward} then {backward}"
                assert grad.dtype == eager[name].dtype, what
                assert grad.is_contiguous(), what
                assert_within_bound(what, grad, eager[name], truth[name])


# The covering set is whole only with the slow part.
FAST = [case for case in cases.CASES[::6] if case["size"][1] < 9000]


@pytest.mark.parametrize("case", FAST, ids=describe)
def test_backend_pairs(case):
    check_pairs(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in cases.CASES if case not in FAST], ids=describe
)
def test_backend_pairs_rest(case):
    check_pairs(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.CASES, ids=describe)
def test_backend_pairs_in_bfloat16(case):
    """The cases again, with bfloat16 for float16; the interpreter does not have it."""
    check_pairs({k: torch.bfloat16 if v == torch.float16 else v for k, v in case.items()})


def test_the_cases_cover_every_pair_of_options():
    assert met_by_all(cases.OPTIONS, cases.CASES)
    assert not met_by_all(cases.OPTIONS, cases.CASES[:9])


def _many_tiles(size: tuple[int, int]) -> dict:
    case = {name: values[0] for name, values in cases.OPTIONS.items()}
    return case | {"size": size, "weight": torch.float32, "bias": torch.float32, "p": 0.1}


# More tiles than programs: a program's sums go on from tile to tile.
@pytest.mark.parametrize("size", [(70, 200), (11, 2100)], ids=str)
def test_weight_gradients_over_many_tiles(size):
    check_pairs(_many_tiles(size))


@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_many_tiles_of_many_blocks(monkeypatch, is_rms_norm):
    """As wide rows are done, but with blocks so small that a few numbers make many of them."""
    config = launchers.Config(rows=2, block=32, warps=16, wide=True)  # of four programs
    monkeypatch.setattr(launchers, "forward_config", lambda *args: config)
    monkeypatch.setattr(launchers, "backward_config", lambda *args, **kwargs: config)
    rest = {"is_rms_norm": is_rms_norm, "prenorm": not is_rms_norm, "grads": "both"}
    check_pairs(_many_tiles((13, 70)) | rest)


@pytest.mark.parametrize("backend", BACKENDS)
def test_worked_example(backend):
    y = fusedformer.layer_norm(torch.tensor([[1.0, 2, 3], [1, 1, 1]]), backend=backend)
    expected = torch.tensor([[-1.2247, 0, 1.2247], [0, 0, 0]])
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=0)
    assert torch.equal(y[1], torch.zeros(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_alone_or_in_a_batch(backend):
    """Bit for bit the same; batch norm, which norms over the batch, is not."""
    torch.manual_seed(0)
    batch = torch.randn(9, 96)
    rows = torch.cat([fusedformer.layer_norm(batch[i : i + 1], backend=backend) for i in range(9)])
    assert torch.equal(fusedformer.layer_norm(batch, backend=backend), rows)
    whole = functional.batch_norm(batch, None, None, training=True)
    part = functional.batch_norm(batch[:4], None, None, training=True)
    assert (whole[:4] - part).abs().max() > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [64, 17000])
def test_shift_and_scale_invariance_of_a_far_row(backend, width):
    """A mean far from zero does not drown the variance, as the mean of squares would."""
    torch.manual_seed(0)
    x = torch.randn(2, width)
    y = fusedformer.layer_norm(x, backend=backend)
    # 1024 + x is exact to 2^-13 in float32, which is all that the norm may lose.
    far = fusedformer.layer_norm(1024 + x, backend=backend)
    assert (far - y).abs().max() < 2**-11
    assert y.mean(-1).abs().max() < 1e-5
    assert (y.square().mean(-1) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_y_is_the_norm_of_the_z_returned(backend):
    """The rounding of z is part of the function, and prenorm changes nothing but what is kept."""
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, 70).half()
    weight = torch.randn(70)
    options = {"weight": weight, "dropout_p": 0.3, "seed": 5, "backend": backend}
    y, z = fusedformer.dropout_add_layer_norm(x, residual, prenorm=True, **options)
    assert torch.equal(y, fusedformer.dropout_add_layer_norm(x, residual, **options))
    assert torch.equal(y, fusedformer.layer_norm(z, weight, backend=backend))


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
def test_masks_are_equal_bit_for_bit(is_rms_norm, prenorm):
    """Both backends, forward and backward, drop what rng.py says."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 333).abs() + 1
    keep = cases.keep_mask(x, 0.3)
    options = {"dropout_p": 0.3, "is_rms_norm": is_rms_norm, "seed": cases.SEED, "prenorm": prenorm}
    upstream = torch.randn(x.shape)
    for backend in BACKENDS:
        leaf = x.clone().requires_grad_()
        out = fusedformer.dropout_add_layer_norm(leaf, backend=backend, **options)
        if prenorm:
            assert torch.equal(out[1] != 0, keep)
        (grad,) = torch.autograd.grad(out[0] if prenorm else out, leaf, upstream)
        assert torch.equal(grad != 0, keep)


def test_the_weight_gradient_is_repeatable():
    torch.manual_seed(0)
    x, grad = torch.randn(2, 60, 300).unbind()
    weight = torch.randn(300, requires_grad=True)
    runs = [
        torch.autograd.grad(fusedformer.layer_norm(x, weight, backend="triton"), weight, grad)[0]
        for _ in range(2)
    ]
    assert torch.equal(*runs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_dropped(backend):
    x, residual = torch.randn(2, 4, 20).unbind()
    x[0, 0] = torch.inf
    x, residual = x.requires_grad_(), residual.requires_grad_()
    y, z = fusedformer.dropout_add_layer_norm(
        x, residual, dropout_p=1.0, prenorm=True, backend=backend
    )
    assert torch.equal(z, residual)
    assert torch.equal(y, fusedformer.layer_norm(residual, backend=backend))
    y.sum().backward()
    assert not x.grad.any()
    lone = fusedformer.dropout_add_layer_norm(x, dropout_p=1.0, backend=backend)
    assert not lone.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)], ids=str)
def test_no_rows(backend, shape):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = torch.randn(2, 8).unbind()
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    y, z = fusedformer.dropout_add_layer_norm(
        x, x.detach(), weight, bias, 0.1, prenorm=True, backend=backend
    )
    assert y.shape == z.shape == shape
    (y.sum() + z.sum()).backward()
    assert x.grad.shape == shape
    assert not weight.grad.any()
    assert not bias.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_dimension(backend):
    x = torch.randn(50)
    y = fusedformer.rms_norm(x, backend=backend)
    torch.testing.assert_close(y, functional.rms_norm(x, (50,), eps=1e-6))
