"""Layer norm's public functions under autograd, compilers and autocast, and their errors."""

import pytest
import torch
from backends import ROW_BACKENDS as BACKENDS
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fusedformer
from fusedformer.kernels import dispatch

pytestmark = pytest.mark.usefixtures("on_device", "fresh_compiler")

dropout_add_layer_norm = fusedformer.dropout_add_layer_norm


def _leaves(*shapes: tuple, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_gradcheck(is_rms_norm, prenorm, p):
    leaves = _leaves((3, 7), (3, 7), (7,), (7,), dtype=torch.float64)

    def function(*args):
        return dropout_add_layer_norm(
            *args, p, prenorm=prenorm, is_rms_norm=is_rms_norm, seed=3, backend="reference"
        )

    assert torch.autograd.gradcheck(function, leaves)
    # One at a time: a gradient that is not asked for must not change the others.
    for i, leaf in enumerate(leaves):
        rest = [other.detach() for other in leaves]

        def partial(value, rest=rest, i=i):
            return function(*rest[:i], value, *rest[i + 1 :])

        assert torch.autograd.gradcheck(partial, leaf)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_one_output_alone(backend):
    """No gradient of an output is the same as a gradient of zeros."""
    leaves = _leaves((5, 40), (5, 40), (40,), (40,))
    y, z = dropout_add_layer_norm(*leaves, 0.2, prenorm=True, seed=1, backend=backend)
    upstream = torch.randn(5, 40)
    both = torch.autograd.grad((y, z), leaves, (upstream, torch.zeros(5, 40)), retain_graph=True)
    alone = torch.autograd.grad(y, leaves, upstream, retain_graph=True)
    for a, b in zip(both, alone, strict=True):
        torch.testing.assert_close(a, b)
    x, residual, weight, _ = torch.autograd.grad(z, leaves, upstream)
    torch.testing.assert_close(residual, upstream)
    torch.testing.assert_close(x, (z - leaves[1]) / leaves[0] * upstream, atol=1e-5, rtol=1e-4)
    assert not weight.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_of_outputs_and_gradients(backend):
    x, residual = _leaves((4, 24), dtype=torch.float16) + _leaves((4, 24))
    weight, bias = _leaves((24,)) + _leaves((24,), dtype=torch.float16)
    y, z = dropout_add_layer_norm(x, residual, weight, bias, 0.1, prenorm=True, backend=backend)
    assert (y.dtype, z.dtype) == (torch.float16, torch.float32)
    (y.sum() + z.sum()).backward()
    for tensor in (x, residual, weight, bias):
        assert tensor.grad.dtype == tensor.dtype
    for in_fp32, dtype in ((False, torch.float16), (True, torch.float32)):
        options = {"residual_in_fp32": in_fp32, "prenorm": True, "backend": backend}
        assert dropout_add_layer_norm(x, **options)[1].dtype == dtype
        # It has no say where there is a residual.
        assert dropout_add_layer_norm(x, x, **options)[1].dtype == torch.float16


def test_what_the_backward_keeps():
    """No mask, no z that was not asked for; with prenorm z alone, so that x is freed."""
    x, residual, weight, bias = _leaves((8, 32), (8, 32), (32,), (32,))
    for prenorm in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
            out = dropout_add_layer_norm(x, residual, weight, bias, 0.1, prenorm=prenorm)
        rows = [tensor for tensor in kept if tensor.shape == x.shape]
        owners = [out[1]] if prenorm else [x, residual]
        assert sorted(t.data_ptr() for t in rows) == sorted(t.data_ptr() for t in owners)
        assert sum(t.numel() for t in kept) == len(owners) * 256 + 2 * 32 + 2 * 8 + 1


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("prenorm", [False, True])
def test_opcheck(p, prenorm):
    x, residual = torch.randn(2, 3, 5, 20).unbind()
    weight, bias = torch.randn(2, 20).unbind()
    seed = torch.tensor(5) if p else None
    args = (x, residual, weight, bias, seed, p, 1e-5, False, prenorm, torch.float32, "")
    op = torch.ops.fusedformer.dropout_add_layer_norm_fwd.default
    torch.library.opcheck(op, args)
    _, z, mean, rstd = op(*args)
    kept = (z, None) if prenorm else (x, residual)
    grads = (torch.randn(3, 5, 20), torch.randn(3, 5, 20) if prenorm else None)
    for wanted in ((True, True, True), (False, False, False)):
        torch.library.opcheck(
            torch.ops.fusedformer.dropout_add_layer_norm_bwd.default,
            (
                *(*grads, *kept, weight, bias, seed, mean, rstd, p, False, prenorm),
                *(torch.float32, *wanted, ""),
            ),
        )


@pytest.mark.parametrize("prenorm", [False, True])
def test_compile_with_dynamic_shapes(prenorm):
    weight, bias = _leaves((48,), (48,))

    def block(x, residual):
        out = dropout_add_layer_norm(
            x * 2, residual, weight, bias, 0.2, prenorm=prenorm, seed=9, backend="triton"
        )
        return out[0] * 3 + out[1] if prenorm else out * 3

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((4, 48), (7, 48)):
        found = []
        for function in (block, compiled):
            torch.manual_seed(1)
            leaves = [*_leaves(shape, shape), weight, bias]
            out = function(*leaves[:2])
            found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for eager, other in zip(*found, strict=True):
            torch.testing.assert_close(other, eager)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compile_with_one_tensor_as_both_operands(requires_grad):
    x = torch.randn(4, 16, requires_grad=requires_grad)
    compiled = torch.compile(dropout_add_layer_norm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, x), fusedformer.layer_norm(2 * x))


def test_inductor():
    x, weight = _leaves((6, 32), (32,))
    norm = torch.compile(lambda x: fusedformer.rms_norm(x.sin(), weight).cos(), fullgraph=True)
    out = norm(x)
    expected = fusedformer.rms_norm(x.sin(), weight).cos()
    torch.testing.assert_close(out, expected)
    for a, b in zip(
        torch.autograd.grad(out.sum(), (x, weight)),
        torch.autograd.grad(expected.sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_export():
    class Block(torch.nn.Module):
        def forward(self, x, residual):
            return dropout_add_layer_norm(x, residual, dropout_p=0.1, seed=4, prenorm=True)

    x, residual = torch.randn(2, 6, 16).unbind()
    rows = torch.export.Dim("rows", min=2, max=100)
    program = torch.export.export(
        Block(), (x, residual), dynamic_shapes={"x": {0: rows}, "residual": {0: rows}}
    )
    for n in (6, 11):
        x, residual = torch.randn(2, n, 16).unbind()
        for a, b in zip(program.module()(x, residual), Block()(x, residual), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpoint_drops_the_same_again(compiled):
    (x,) = _leaves((6, 64))

    def block(x):
        return dropout_add_layer_norm(x, x.tanh(), dropout_p=0.5) ** 2

    def run(function):
        torch.manual_seed(3)
        out = function(x)
        return out.detach(), torch.autograd.grad(out.sum(), x)[0]

    def recomputed(x):
        return checkpoint(block, x, use_reentrant=False)

    if compiled:
        recomputed = torch.compile(recomputed, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(block), run(recomputed), strict=True):
        torch.testing.assert_close(a, b)


def test_a_new_mask_each_call_and_the_same_under_a_seed():
    x = torch.ones(4, 100)

    def mask(**kwargs):
        return dropout_add_layer_norm(x, dropout_p=0.5, prenorm=True, **kwargs)[1] != 0

    assert not torch.equal(mask(), mask())
    assert torch.equal(mask(seed=8), mask(seed=torch.tensor(8)))
    assert not torch.equal(mask(seed=8), mask(seed=9))
    torch.manual_seed(1)
    first = mask()
    torch.manual_seed(1)
    assert torch.equal(first, mask())
    # Another op under one seed draws another mask.
    assert not torch.equal(mask(seed=8), fusedformer.dropout(x, 0.5, seed=8) != 0)


def test_autocast_keeps_the_dtype():
    x = torch.randn(3, 16)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert fusedformer.layer_norm(x).dtype == torch.float32
        half = x.to(torch.bfloat16)
        y, z = dropout_add_layer_norm(half, x, torch.ones(16), prenorm=True)
    assert (y.dtype, z.dtype) == (torch.bfloat16, torch.float32)


def test_the_plain_norms_are_torch_s():
    x, weight, bias = _leaves((2, 5, 33), (33,), (33,))
    torch.testing.assert_close(
        fusedformer.layer_norm(x, weight, bias, 1e-3),
        functional.layer_norm(x, (33,), weight, bias, 1e-3),
    )
    torch.testing.assert_close(
        fusedformer.rms_norm(x, weight, 1e-3), functional.rms_norm(x, (33,), weight, 1e-3)
    )


X = torch.zeros(2, 3, device="cpu")


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor; got list"),
        ({"x": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "x must be float32"),
        ({"x": torch.zeros(())}, ValueError, r"x must have a last dimension .* got \(\)"),
        ({"x": torch.zeros(4, 0)}, ValueError, r"x must have a last dimension .* got \(4, 0\)"),
        ({"residual": torch.zeros(3)}, ValueError, r"residual must be \(2, 3\).* got \(3,\)"),
        ({"residual": X.double()}, TypeError, "float64 goes with float64 only.* residual"),
        ({"residual": X.to("meta")}, ValueError, "residual must be on the device of x, cpu"),
        ({"weight": torch.zeros(2)}, ValueError, r"weight must be \(3,\).* got \(2,\)"),
        ({"weight": torch.zeros(3).long()}, TypeError, "weight must be float32"),
        ({"bias": torch.zeros(1)}, ValueError, r"bias must be \(3,\)"),
        ({"bias": 0.0}, TypeError, "bias must be a tensor; got float"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be from 0 to 1; got -0.1"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be from 0 to 1; got 1.5"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a number"),
        ({"eps": -1e-5}, ValueError, "eps must be a number, 0 or more; got -1e-05"),
        ({"eps": float("nan")}, ValueError, "eps must be a number"),
        ({"eps": None}, TypeError, "eps must be a number"),
        ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed must be an int"),
        ({"dropout_p": 0.1, "seed": torch.zeros(2)}, ValueError, "seed must be an int or a 0-d"),
        ({"backend": "cudnn"}, ValueError, "backend must be one of .* got 'cudnn'"),
    ],
)
def test_bad_input(kwargs, error, message):
    kwargs = {"x": X, **kwargs}
    with pytest.raises(error, match="dropout_add_layer_norm: " + message):
        dropout_add_layer_norm(kwargs.pop("x"), **kwargs)


def test_the_plain_norms_name_themselves_in_errors():
    with pytest.raises(ValueError, match="layer_norm: weight must be"):
        fusedformer.layer_norm(X, torch.zeros(4))
    with pytest.raises(ValueError, match="rms_norm: weight must be"):
        fusedformer.rms_norm(X, torch.zeros(4))


def test_a_named_backend_runs_or_says_why_not():
    with pytest.raises(RuntimeError, match=r"cannot run.*float64 .*reference"):
        fusedformer.layer_norm(torch.zeros(2, 3, dtype=torch.float64), backend="triton")
    with dispatch.use_backend("triton"), pytest.raises(RuntimeError, match="float64"):
        fusedformer.layer_norm(torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.gpu
def test_graph_replay_draws_fresh_masks():
    x = torch.ones(64, 512, device="cuda", requires_grad=True)

    def step():
        out = dropout_add_layer_norm(x, dropout_p=0.5, prenorm=True)[1]
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
