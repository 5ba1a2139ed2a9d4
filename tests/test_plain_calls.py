"""Calls without options: the shortest way computes the same bits, and only where it may."""

import pytest
import torch
from torch.autograd import forward_ad

from fusedformer import (
    attention,
    available_backends,
    dropout_add_layer_norm,
    layer_norm,
    rms_norm,
    scaled_dot_product_attention,
    use_backend,
)
from fusedformer.kernels import attention_plain as plain
from fusedformer.kernels import dispatch

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=str(available_backends()["cpu"])
)

# (B, H, Nq, D), (B, Hkv, Nk, D)
SHAPES = [
    ((1, 8, 16, 64), (1, 8, 16, 64)),
    ((2, 4, 5, 7), (2, 2, 33, 7)),  # grouped, ragged
    ((1, 2, 1, 256), (1, 1, 130, 256)),
    ((2, 3, 70, 16), (2, 3, 9, 16)),  # under a causal mask, rows with nothing to attend to
]


@pytest.fixture
def directly(monkeypatch):
    """Fails where a call chooses a backend, as it does on its ordinary way alone."""

    def here():
        here.pick = dispatch.pick
        monkeypatch.setattr(dispatch, "pick", lambda *args: pytest.fail("the ordinary way"))

    attention(*(torch.ones(1, 1, 1, 1),) * 3)  # the first call of an op loads the backend
    layer_norm(torch.ones(1, 1))
    yield here
    monkeypatch.undo()


def make(shapes, dtype=torch.float32, grad=False):
    torch.manual_seed(0)
    query, key = shapes
    return [torch.randn(s, dtype=dtype).requires_grad_(grad) for s in (query, key, key)]


OPTIONS = [{}, {"causal": True}, {"causal": True, "scale": -0.3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_the_same_bits_as_the_ordinary_way(shapes, dtype, options, directly):
    tensors = make(shapes, dtype, grad=True)
    wanted = attention(*tensors, backend="cpu", **options)
    grad_out = torch.randn(shapes[0]).to(dtype)
    wanted_grads = torch.autograd.grad(wanted, tensors, grad_out)
    directly()
    found = attention(*tensors, **options)
    with torch.no_grad():
        alone = attention(*tensors, **options)
    assert torch.equal(found, wanted)
    assert torch.equal(alone, wanted)
    assert found.stride() == alone.stride() == wanted.stride()
    grads = torch.autograd.grad(found, tensors, grad_out)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert torch.equal(grad, wanted_grad)
        assert grad.stride() == wanted_grad.stride()


def test_any_strides(directly):
    x = torch.randn(2, 16, 3, 4, 8)
    rows = [x[:, :, n].transpose(1, 2) for n in range(3)]
    columns = [torch.randn(2, 4, 8, 16).transpose(2, 3) for _ in range(3)]  # D is apart
    expanded = [torch.randn(1, 1, 1, 8).expand(2, 4, 16, 8) for _ in range(3)]
    for tensors in (rows, columns, expanded):
        wanted = attention(*tensors, backend="cpu")
        assert torch.equal(attention(*tensors), wanted)
    directly()
    assert torch.equal(attention(*expanded), wanted)


def test_lazy_negatives_are_what_they_stand_for(directly):
    size = (1, 2, 5, 8)
    lazy = [torch.complex(torch.zeros(size), torch.randn(size)).conj().imag for _ in range(4)]
    assert all(x.is_neg() for x in lazy)
    *tensors, grad_out = [x.resolve_neg() for x in lazy]
    leaves = [x.requires_grad_() for x in tensors]
    wanted = attention(*leaves, backend="cpu")
    wanted_grads = torch.autograd.grad(wanted, leaves, grad_out)
    normed = layer_norm(tensors[0].detach(), tensors[1][0, 0, 0].detach(), backend="cpu")
    directly()
    assert torch.equal(attention(*lazy[:3]), wanted)
    assert torch.equal(layer_norm(lazy[0], lazy[1][0, 0, 0]), normed)
    lazy_leaves = [x.detach().requires_grad_() for x in lazy[:3]]
    grads = torch.autograd.grad(attention(*lazy_leaves), lazy_leaves, lazy[3])
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted_grads, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_torchs_function_is_the_same(causal, directly):
    tensors = make(SHAPES[0])
    wanted = scaled_dot_product_attention(*tensors, is_causal=causal, backend="cpu")
    directly()
    assert torch.equal(scaled_dot_product_attention(*tensors, is_causal=causal), wanted)
    assert torch.equal(attention(*tensors, causal=causal), wanted)


def test_torchs_causal_rule_where_lengths_differ():
    """Query 0 sees key 0 alone, whereas attention()'s last query sees the last key."""
    query, key, value = make(((1, 1, 4, 8), (1, 1, 9, 8)))
    found = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.equal(found[:, :, 0], value[:, :, 0])


def test_gradients_of_gradients_are_refused():
    tensors = make(SHAPES[0], grad=True)
    out = attention(*tensors)
    grad_out = torch.ones_like(out).requires_grad_()
    (grad,) = torch.autograd.grad(out, tensors[:1], grad_out, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_batch_of_gradients_is_computed_one_by_one():
    tensors = make(SHAPES[1], grad=True)
    out = attention(*tensors, causal=True)
    batch = torch.randn(3, *out.shape)
    together = torch.autograd.grad(out, tensors, batch, is_grads_batched=True, retain_graph=True)
    for n, grad_out in enumerate(batch):
        single = torch.autograd.grad(out, tensors, grad_out, retain_graph=True)
        assert all(torch.equal(a[n], b) for a, b in zip(together, single, strict=True))


def test_where_it_may_not_be_taken(monkeypatch):
    tensors = make(SHAPES[0])
    attention(*tensors)

    def straight(*args):
        return dispatch.straight_to_cpu("attention", args) is not None

    assert straight(*tensors)
    with use_backend("reference"):
        assert not straight(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert not straight(*tensors)
        assert attention(*tensors).dtype == torch.bfloat16
    with forward_ad.dual_level():
        assert not straight(*tensors)
    assert not straight(tensors[0].to("meta"), *tensors)
    for wrong in (None, 1.0, [tensors[0]]):
        assert not straight(tensors[0], wrong, tensors[2])
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("reference",))
    assert not straight(*tensors)


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_unusual_is_handed_back(grad):
    """float64, no queries, other devices, sparse tensors, what is wrong: attention() knows."""
    query, key, value = make(SHAPES[0], grad=grad)
    wrong = [
        (query.double(), key.double(), value.double()),
        (query[:, :, :0], key, value),
        (query, key[:, :, :0], value[:, :, :0]),
        (query, key.half(), value),
        (query, key.to("meta"), value),
        (query, key.detach().to_sparse(), value),
        (query, key[..., :32], value[..., :32]),
        (query, key, value[:, :, :3]),
        (query[:, :3], key[:, :2], value[:, :2]),
        (query[0], key[0], value[0]),
        (query.repeat(1, 1, 1, 5), key.repeat(1, 1, 1, 5), value.repeat(1, 1, 1, 5)),
    ]
    for tensors in wrong:
        assert plain.attention_plain(*tensors, False, None, 0.0) is None
    for scale in (float("nan"), float("inf")):
        assert plain.attention_plain(query, key, value, False, scale, 0.0) is None
    for p in (0.1, 0, "0", torch.tensor(0.0)):
        assert plain.attention_plain(query, key, value, False, None, p) is None


# --- Norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(4, 64), (1,), (3, 5, 130), (2, 2000)], ids=str)
def test_norms_are_the_same_bits_as_on_the_ordinary_way(size, dtype, directly):
    x = torch.randn(size).to(dtype)
    weight, bias = torch.randn(size[-1]), torch.randn(size[-1]).to(dtype)
    calls = [
        (layer_norm, (x, weight, bias)),
        (layer_norm, (x,)),
        (layer_norm, (x, None, bias)),
        (layer_norm, (x, weight, None, 0.5)),
        (rms_norm, (x, weight)),
        (rms_norm, (x, None, 1e-5)),
        (layer_norm, (x.transpose(0, -1).contiguous().transpose(0, -1), weight, bias)),
    ]
    wanted = [norm(*args, backend="cpu") for norm, args in calls]
    directly()
    for (norm, args), y in zip(calls, wanted, strict=True):
        found = norm(*args)
        assert torch.equal(found, y)
        assert (found.dtype, found.stride()) == (y.dtype, y.stride())


def test_norms_that_are_unusual_or_wrong_are_handed_back():
    x, weight = torch.randn(3, 8), torch.randn(8)
    layer_norm(x)
    assert layer_norm(x.double()).dtype == torch.float64
    assert layer_norm(x[:0]).shape == (0, 8)
    assert layer_norm(x.to("meta")).device.type == "meta"
    assert layer_norm(x, weight.clone().requires_grad_()).requires_grad
    wrong = [
        (x, weight[:7]),
        (x, weight[None]),
        (x, weight.double()),
        (x, weight.long()),
        (x, weight.to("meta")),
        (x, (8,)),
        (x, weight, 1.0),
        (x, None, None, -1.0),
        (x, None, None, float("nan")),
        (x.long(),),
        (x[0, 0],),
        (x[:, :0],),
    ]
    for args in wrong:
        with pytest.raises((TypeError, ValueError), match="layer_norm: "):
            layer_norm(*args)


# x, residual, weight, bias: dtypes of those that are there.
F32, B16, H16 = torch.float32, torch.bfloat16, torch.float16
MIXES = [
    (F32, F32, F32, F32),
    (B16, B16, B16, B16),
    (B16, F32, F32, None),
    (H16, F32, None, B16),
    (H16, None, H16, H16),
    (F32, H16, None, None),
]


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_norms_gradients_are_the_same_bits_as_on_the_ordinary_way(
    mix, p, is_rms_norm, directly, monkeypatch
):
    torch.manual_seed(0)
    size = (3, 70, 33)
    sizes = (size, size, size[-1:], size[-1:])
    args = [
        dtype and torch.randn(s).to(dtype).requires_grad_()
        for s, dtype in zip(sizes, mix, strict=True)
    ]
    there = [tensor for tensor in args if tensor is not None]
    grad_y = torch.randn(size).to(mix[0])

    def call(**options):
        torch.manual_seed(1)
        return dropout_add_layer_norm(*args, p, 1e-3, is_rms_norm=is_rms_norm, **options)

    wanted = call(backend="cpu")
    wanted_grads = torch.autograd.grad(wanted, there, grad_y)
    later = call()
    directly()
    found = call()
    with torch.no_grad():
        alone = call()
    assert type(found.grad_fn).__name__ == "_PlainBackward"
    assert torch.equal(found, wanted)
    assert torch.equal(alone, wanted)
    grads = torch.autograd.grad(found, there, grad_y, retain_graph=True)
    only = torch.autograd.grad(found, there[-1], grad_y)
    for grad, wanted_grad in zip((*grads, *only), (*wanted_grads, wanted_grads[-1]), strict=True):
        assert torch.equal(grad, wanted_grad)
        assert (grad.dtype, grad.stride()) == (wanted_grad.dtype, wanted_grad.stride())
    # A backward that something looks on at goes through the op.
    monkeypatch.setattr(dispatch, "pick", directly.pick)
    with torch.autograd.profiler.profile() as seen:
        observed = torch.autograd.grad(later, there, grad_y)
    events = {event.name for event in seen.function_events}
    assert "fusedformer::dropout_add_layer_norm_bwd" in events
    for grad, wanted_grad in zip(observed, wanted_grads, strict=True):
        assert torch.equal(grad, wanted_grad)


@pytest.mark.parametrize("p", [0.1, 0.0])
def test_an_unusual_call_draws_one_seed(p):
    """As the ordinary way does: the generator is then where a compiled model has it."""
    x = torch.randn(5, 8)
    for tensor in (x, x.double(), x[:0]):
        after = []
        for backend in (None, "reference"):
            torch.manual_seed(0)
            dropout_add_layer_norm(tensor, dropout_p=p, backend=backend)
            after.append(torch.rand(()))
        assert after[0] == after[1]


def test_dropout_and_residual_that_are_wrong_are_refused_by_name():
    x = torch.randn(3, 8)
    dropout_add_layer_norm(x)
    for name, options in {
        "residual": {"residual": torch.randn(3, 7)},
        "dropout_p": {"dropout_p": 1.5},
        "eps": {"eps": float("nan")},
    }.items():
        with pytest.raises(ValueError, match=f"dropout_add_layer_norm: {name}"):
            dropout_add_layer_norm(x, **options)
    with pytest.raises(TypeError, match="dropout_add_layer_norm: residual"):
        dropout_add_layer_norm(x, x.long())


def test_norms_gradients_of_gradients_are_refused():
    x = torch.randn(3, 8, requires_grad=True)
    layer_norm(x)
    grad_y = torch.randn(3, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(layer_norm(x), x, grad_y, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
