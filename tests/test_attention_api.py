"""Attention as a PyTorch function: errors, autograd, compile, export, autocast, SDPA."""

import math

import pytest
import torch
from backends import BACKENDS, ONE_BACKEND
from torch.utils.checkpoint import checkpoint

from fusedformer import attention, scaled_dot_product_attention, use_backend

pytestmark = pytest.mark.usefixtures("on_device", "fresh_compiler")


def _inputs(*shape, dtype=torch.float32, grad=False, count=3):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for _ in range(count)]


# --- Autograd and registration --------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_through_the_reference(causal):
    torch.manual_seed(0)
    query = torch.randn(2, 4, 7, 3, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    mask = torch.randn(4, 1, 5, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([5, 3])

    def call(query, key, value, mask):
        return attention(
            query, key, value, mask=mask, key_lengths=lengths, causal=causal, dropout_p=0.3, seed=4
        )

    def lse(query, key, mask):
        # Rows with nothing to attend to have an LSE of -inf, which finite differences cannot take.
        seen = attention(query, key, value, mask=mask, key_lengths=lengths, return_lse=True)[1]
        return seen.exp()

    assert torch.autograd.gradcheck(call, (query, key, value, mask))
    assert torch.autograd.gradcheck(lse, (query, key, mask))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_requires_a_gradient_gets_one(backend):
    query, key, value = _inputs(1, 2, 20, 16)
    query.requires_grad_()
    attention(query, key, value, backend=backend).sum().backward()
    assert query.grad is not None
    assert key.grad is None
    with torch.no_grad():
        assert not attention(query, key, value, backend=backend).requires_grad


def test_second_derivatives_raise():
    query, key, value = _inputs(1, 1, 4, 4, grad=True)
    loss = attention(query, key, value).square().sum()
    (grad,) = torch.autograd.grad(loss, query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def _op_arguments(**changes):
    query, key, value = _inputs(2, 2, 9, 4)
    arguments = {
        "query": query, "key": key, "value": value, "mask": torch.randn(1, 2, 9, 9),
        "key_lengths": torch.tensor([9, 4], dtype=torch.int32), "seed": torch.tensor(3),
        "diagonal": 0, "scale": 0.5, "dropout_p": 0.1, "offsets": [0, 0, 16, 0],
        "backend": "reference",
    }  # fmt: skip
    return tuple({**arguments, **changes}.values())


@pytest.mark.parametrize("backend", ONE_BACKEND)
@pytest.mark.parametrize("changes", [{}, {"mask": None, "key_lengths": None, "diagonal": None}])
def test_opcheck(changes, backend):
    args = _op_arguments(**changes, backend=backend)
    torch.library.opcheck(torch.ops.fusedformer.attention_fwd.default, args)
    out, lse = torch.ops.fusedformer.attention_fwd.default(*args)
    grads = (torch.randn_like(out), torch.randn_like(lse), out, lse)
    mask_grad = args[3] is not None
    torch.library.opcheck(
        torch.ops.fusedformer.attention_bwd.default, (*grads, *args[:-1], mask_grad, args[-1])
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_are_views_of_bnhd_memory(backend):
    query, key, value = (t.requires_grad_() for t in _inputs(2, 3, 20, 16))
    out = attention(query, key, value, backend=backend)
    grads = torch.autograd.grad(out, (query, key, value), torch.randn_like(out))
    for tensor in (out, *grads):
        assert tensor.transpose(1, 2).is_contiguous()


# --- Compile, export, checkpoint, autocast --------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_dynamic_shapes(backend):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    def call(query, key, value):
        return attention(query, key, value, causal=True, dropout_p=0.2) * 2

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
    for batch, length in [(2, 20), (3, 33), (4, 70)]:
        tensors = _inputs(batch, 5, length, 8, grad=True)  # no two sizes alike: Dynamo ties those
        results = []
        for function in (call, compiled):
            torch.manual_seed(7)
            out = function(*tensors)
            results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
        if backend == "aot_eager":  # inductor draws the seed from a generator of its own
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)
    assert len(graphs) == 1


def test_compiled_dropout_under_an_explicit_seed():
    torch._dynamo.reset()
    tensors = _inputs(1, 2, 30, 8)

    def call(query, key, value):
        return attention(query, key, value, dropout_p=0.4, seed=11)

    compiled = torch.compile(call, fullgraph=True, backend="inductor")
    torch.testing.assert_close(compiled(*tensors), call(*tensors))


def test_compile_sees_use_backend():
    torch._dynamo.reset()
    tensors = _inputs(1, 2, 20, 16)
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    plain = compiled(*tensors)
    with use_backend("triton"):
        torch.testing.assert_close(compiled(*tensors), plain, atol=1e-6, rtol=1e-5)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, query, key, value):
            return attention(query, key, value, causal=True)

    length = torch.export.Dim("length", min=2, max=512)
    tensors = _inputs(2, 2, 20, 8)
    shapes = {name: {2: length} for name in ("query", "key", "value")}
    exported = torch.export.export(Module(), tuple(tensors), dynamic_shapes=shapes)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert "fusedformer.attention_fwd.default" in targets
    longer = _inputs(2, 2, 45, 8)
    torch.testing.assert_close(exported.module()(*longer), attention(*longer, causal=True))


def test_compile_without_gradients_and_of_one_tensor_thrice():
    torch._dynamo.reset()
    (tensor,) = _inputs(1, 2, 20, 8, count=1)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    wanted = attention(tensor, tensor, tensor)
    torch.testing.assert_close(compiled(tensor, tensor, tensor), wanted)
    tensor.requires_grad_()
    out = compiled(tensor, tensor, tensor)
    (grad,) = torch.autograd.grad(out.square().sum(), tensor)
    (plain,) = torch.autograd.grad(attention(tensor, tensor, tensor).square().sum(), tensor)
    torch.testing.assert_close(grad, plain)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tensor, tensor, tensor), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_the_same_mask(reentrant):
    tensors = _inputs(1, 2, 30, 8, grad=True)

    def call(*tensors):
        return attention(*tensors, dropout_p=0.5)

    results = []
    for function in (call, lambda *t: checkpoint(call, *t, use_reentrant=reentrant)):
        torch.manual_seed(3)
        out = function(*tensors)
        for tensor in tensors:
            tensor.grad = None
        out.square().sum().backward()
        results.append([out.detach(), *(t.grad.clone() for t in tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast():
    tensors = _inputs(1, 2, 20, 8, grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(*tensors)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which leaves float64 alone, as torch's does
        double = [t.double() for t in tensors]
        assert attention(*double, backend="reference").dtype == torch.float64


def test_meta_tensors():
    out, lse = attention(*(torch.randn(2, 3, 5, 8, device="meta") for _ in range(3)),
                         return_lse=True)  # fmt: skip
    assert out.shape == (2, 3, 5, 8)
    assert lse.shape == (2, 3, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_of_zero_and_poisoned_keys(backend):
    """NaN past the lengths reaches neither output nor gradient."""
    query, key, value = _inputs(3, 2, 40, 16)
    lengths = torch.tensor([0, 40, 17])
    clean = [t.requires_grad_() for t in (query, key, value)]
    past = (torch.arange(40) >= lengths[:, None])[:, None, :, None]
    dirty = [query.detach().clone()]
    dirty += [t.detach().masked_fill(past, math.nan) for t in (key, value)]
    dirty = [t.requires_grad_() for t in dirty]
    results = []
    for tensors in (clean, dirty):
        out, lse = attention(*tensors, key_lengths=lengths, return_lse=True, backend=backend)
        results.append((out, lse, *torch.autograd.grad(out.square().sum(), tensors)))
    for a, b in zip(*results, strict=True):
        assert not a.isnan().any()
        assert torch.equal(a, b)
    assert not results[0][0][0].any()
    assert (results[0][1][0] == -math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_merging_empty_rows_gives_no_nan(backend):
    """Two parts without keys merge to an LSE of -inf, whose gradient torch gives as NaN."""
    tensors = [t.requires_grad_() for t in _inputs(1, 2, 20, 16)]
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[3] = False
    lse = attention(*tensors, mask=mask, return_lse=True, backend=backend)[1]
    torch.logaddexp(lse, lse).sum().backward()
    assert not any(t.grad.isnan().any() for t in tensors if t.grad is not None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [-1e30, -1e38, -math.inf])
def test_large_negative_additive_values_hide(backend, value):
    query, key, val = _inputs(1, 2, 20, 16)
    shown = torch.rand(20, 20) > 0.5
    shown[3] = False
    additive = torch.zeros(20, 20).masked_fill(~shown, value)
    out = attention(query, key, val, mask=additive, backend=backend)
    wanted = attention(query, key, val, mask=shown, backend=backend)
    assert torch.equal(out, wanted)
    assert not out[:, :, 3].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_of_zero_is_the_mean(backend):
    query, key, value = (t.requires_grad_() for t in _inputs(1, 2, 20, 16))
    out = attention(query, key, value, scale=0.0, causal=True, backend=backend)
    count = torch.arange(1.0, 21)[:, None]
    torch.testing.assert_close(out, value.cumsum(2) / count, atol=1e-6, rtol=1e-5)
    grads = torch.autograd.grad(out.square().sum(), (query, key, value))
    assert not grads[0].any()
    assert not grads[1].any()
    assert grads[2].isfinite().all()


# --- scaled_dot_product_attention -----------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("query", "key", "value", "options"),
    [
        ((2, 4, 9, 16), (2, 4, 7, 16), (2, 4, 7, 16), {}),
        ((2, 4, 9, 16), (2, 4, 7, 16), (2, 4, 7, 16), {"is_causal": True}),
        ((2, 4, 9, 16), (2, 2, 7, 16), (2, 2, 7, 16), {"enable_gqa": True, "scale": 0.7}),
        ((4, 9, 16), (4, 7, 16), (4, 7, 16), {"attn_mask": "bool"}),
        ((9, 16), (7, 16), (7, 16), {"attn_mask": "float"}),
        ((2, 3, 4, 9, 16), (2, 3, 4, 7, 16), (2, 3, 4, 7, 16), {"attn_mask": "float"}),
        ((2, 4, 9, 16), (2, 4, 7, 16), (2, 4, 7, 24), {}),
        ((2, 4, 9, 16), (1, 1, 7, 16), (4, 7, 16), {}),
        ((1, 4, 9, 16), (2, 4, 7, 16), (2, 4, 7, 16), {"is_causal": True}),
        ((4, 9, 16), (1, 7, 16), (7, 16), {"attn_mask": "bool"}),
        ((3, 2, 4, 9, 16), (2, 1, 7, 16), (1, 2, 4, 7, 16), {"attn_mask": "float"}),
        ((2, 4, 9, 16), (2, 4, 7, 16), (2, 4, 7, 5), {"is_causal": True}),
    ],
    ids=str,
)
def test_sdpa_equals_torchs(query, key, value, options, backend):
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in (query, key, value)]
    options = dict(options)
    if "attn_mask" in options:
        scores = torch.randn(*query[:-1], key[-2])
        options["attn_mask"] = scores > 0 if options["attn_mask"] == "bool" else scores
    wanted = torch.nn.functional.scaled_dot_product_attention(*tensors, **options)
    out = scaled_dot_product_attention(*tensors, **options, backend=backend)
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=1e-5)


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_cuda_graph_replays_draw_new_masks():
    query, key, value = (torch.randn(1, 2, 64, 64, device="cuda").bfloat16() for _ in range(3))
    attention(query, key, value, dropout_p=0.5)  # compiled outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(query, key, value, dropout_p=0.5)
    results = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        results.append(out.clone())
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


@pytest.mark.gpu
def test_memory_is_linear_on_a_gpu():
    extra = []
    for length in (4096, 8192):
        tensors = [
            torch.randn(1, 4, length, 64, device="cuda").bfloat16().requires_grad_()
            for _ in range(3)
        ]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention(*tensors, causal=True, dropout_p=0.1).sum().backward()
        extra.append(torch.cuda.max_memory_allocated() - before)
    assert extra[1] < 2.2 * extra[0]
