"""fusedformer.sdpa(): which calls it takes, which it leaves and why, and what it leaves behind."""

import threading

import pytest
import torch
import torch.utils.checkpoint
from backends import BACKENDS
from bounds import assert_within_bound
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import fusedformer
from fusedformer import use_backend

TORCH = functional.scaled_dot_product_attention

pytestmark = pytest.mark.skipif(
    "cpu" not in BACKENDS and not torch.cuda.is_available(), reason="there are no fused kernels"
)


@pytest.fixture(autouse=True)
def _device(on_device):
    yield
    assert functional.scaled_dot_product_attention is TORCH


def qkv(heads=2, kv_heads=2, queries=9, keys=9, dim=8, **options):
    sizes = (heads, queries), (kv_heads, keys), (kv_heads, keys)
    return [torch.randn(3, h, n, dim, **options) for h, n in sizes]


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, {}),
        ({"is_causal": True}, {"keys": 13}),
        ({"scale": 0.3}, {"queries": 1}),
        ({"enable_gqa": True}, {"heads": 6}),
        ({"attn_mask": torch.ones(9, 9).tril().bool()}, {}),
        ({"attn_mask": torch.linspace(-1, 1, 81).view(9, 9)}, {}),
    ],
    ids=["plain", "causal", "scale", "gqa", "bool mask", "additive mask"],
)
def test_a_call_is_fused_and_the_same(options, sizes):
    inputs = qkv(**sizes, requires_grad=True)
    device = inputs[0].device
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    results = []
    for dtype, switch in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        mask = options.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            options["attn_mask"] = mask.to(dtype)

        def call(tensors=tensors):
            return functional.scaled_dot_product_attention(*tensors, **options)

        if switch:
            with fusedformer.sdpa() as counts:
                out = call()
            assert (counts.fused, counts.left.total()) == (1, 0)
        else:
            out = call()
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        results.append([out, *torch.autograd.grad((out * weight.to(out)).sum(), tensors)])
    for name, *values in zip(("O", "dQ", "dK", "dV"), *results, strict=True):
        assert_within_bound(name, *values)


def test_arguments_by_name_and_by_place():
    q, k, v = qkv()
    with fusedformer.sdpa() as counts:
        first = functional.scaled_dot_product_attention(q, k, v, None, 0.0, True)
        again = functional.scaled_dot_product_attention(
            query=q, key=k, value=v, is_causal=True, dropout_p=0.0
        )
    assert torch.equal(first, again)
    assert counts.fused == 2


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("float64", lambda: (qkv(dtype=torch.float64), {})),
        ("head dimension must be 1 to 256", lambda: (qkv(dim=300), {})),
        ("meta", lambda: (qkv(device="meta"), {})),
    ],
)
def test_a_call_is_left_to_torch_with_the_reason(reason, make):
    tensors, options = make()
    with fusedformer.sdpa() as counts:
        out = functional.scaled_dot_product_attention(*tensors, **options)
    assert counts.fused == 0
    assert [reason in why for why in counts.left] == [True]
    assert reason in str(counts)
    if out.device.type != "meta":
        assert torch.equal(out, TORCH(*tensors, **options))


def test_torchs_errors_stay_torchs():
    q, k, v = qkv()
    with fusedformer.sdpa(), pytest.raises(RuntimeError) as ours:
        functional.scaled_dot_product_attention(q, k[..., :3], v)
    with pytest.raises(RuntimeError) as theirs:
        TORCH(q, k[..., :3], v)
    assert str(ours.value) == str(theirs.value)


def test_transforms_and_tracing_are_left():
    q, k, v = qkv()

    def f(query):
        return functional.scaled_dot_product_attention(query, k, v)

    with fusedformer.sdpa() as counts:
        torch.func.vmap(f, randomness="different")(q[None])
        torch.func.grad(lambda query: f(query).sum())(q)
        with sdpa_kernel(SDPBackend.MATH):
            torch.func.jvp(f, (q,), (q,))
            with forward_ad.dual_level():
                f(forward_ad.make_dual(q, q))
        torch.jit.trace(f, q, check_trace=False)
    assert counts.fused == 0
    assert counts.left.total() == 5


def test_other_tensors_are_left():
    nested = torch.nested.nested_tensor(
        [torch.randn(5, 2, 8), torch.randn(3, 2, 8)], layout=torch.jagged
    ).transpose(1, 2)
    with fusedformer.sdpa() as counts:
        functional.scaled_dot_product_attention(nested, nested, nested)
    assert list(counts.left) == ["NestedTensor is not a plain tensor"]


def test_a_named_backend_is_used():
    inputs = qkv()
    torch.manual_seed(3)
    truth = fusedformer.scaled_dot_product_attention(*inputs, dropout_p=0.3, backend="reference")
    torch.manual_seed(3)
    with fusedformer.sdpa() as counts, use_backend("reference"):
        out = functional.scaled_dot_product_attention(*inputs, dropout_p=0.3)
    assert torch.equal(out, truth)
    assert counts.fused == 1


# --- In force, and out of it ----------------------------------------------------------------------


def test_nested_blocks_count_for_the_innermost():
    inputs = qkv()
    outer = fusedformer.sdpa()
    with outer:
        with fusedformer.sdpa() as inner, inner:
            functional.scaled_dot_product_attention(*inputs)
        functional.scaled_dot_product_attention(*inputs)
        with outer:
            functional.scaled_dot_product_attention(*inputs)
        assert functional.scaled_dot_product_attention is not TORCH
    assert (outer.fused, inner.fused) == (2, 1)


def test_installed_until_it_is_uninstalled():
    switch, other = fusedformer.sdpa(), fusedformer.sdpa()
    switch.install()
    other.install()
    switch.uninstall()  # in any order
    functional.scaled_dot_product_attention(*qkv())
    other.uninstall()
    assert (switch.fused, other.fused) == (0, 1)
    with pytest.raises(RuntimeError, match=r"sdpa\.uninstall: .* not installed"):
        other.uninstall()


def test_an_error_ends_the_block():
    with pytest.raises(KeyError), fusedformer.sdpa():
        raise KeyError


def test_a_name_bound_meanwhile_does_nothing_afterwards():
    with fusedformer.sdpa() as counts:
        bound = functional.scaled_dot_product_attention
    inputs = qkv()
    assert torch.equal(bound(*inputs, scale=0.2), TORCH(*inputs, scale=0.2))
    assert counts.fused == 0


def test_someone_elses_wrapper_stays():
    with fusedformer.sdpa():
        inner = functional.scaled_dot_product_attention
        functional.scaled_dot_product_attention = wrapper = lambda *args: inner(*args)
    assert functional.scaled_dot_product_attention is wrapper
    functional.scaled_dot_product_attention = TORCH


def test_all_threads_are_switched():
    with fusedformer.sdpa() as counts:
        thread = threading.Thread(target=functional.scaled_dot_product_attention, args=qkv())
        thread.start()
        thread.join()
    assert counts.fused == 1


def test_checkpointing_drops_the_same():
    query, key, value = qkv(requires_grad=True)

    def f(q):
        return functional.scaled_dot_product_attention(q, key, value, dropout_p=0.5)

    grads = []
    with fusedformer.sdpa() as counts:
        for run in (f, lambda q: torch.utils.checkpoint.checkpoint(f, q, use_reentrant=False)):
            torch.manual_seed(4)
            grads.append(torch.autograd.grad(run(query).square().sum(), query)[0])
    assert torch.equal(*grads)
    assert counts.left.total() == 0


# --- Compiled -------------------------------------------------------------------------------------


def test_compiled_code_follows_the_switch_without_new_compiles(fresh_compiler):
    graphs = []

    def backend(module, example_inputs):
        names = [str(node.target) for node in module.graph.nodes]
        graphs.append("torch" if any("built-in function scaled" in n for n in names) else "ours")
        return module

    def f(q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True) * 2

    compiled = torch.compile(f, fullgraph=True, backend=backend)
    inputs = qkv(requires_grad=True)
    for _ in range(3):
        with fusedformer.sdpa() as counts:
            ours = compiled(*inputs)
        compiled(*inputs)
        with fusedformer.sdpa(), fusedformer.sdpa():
            compiled(*inputs)
    assert graphs == ["ours", "torch"]
    assert (counts.fused, counts.left.total()) == (0, 0)
    with fusedformer.sdpa():
        assert torch.equal(ours, f(*inputs))


def test_compiled_calls_are_counted_when_they_are_traced(fresh_compiler):
    def f(q):
        q = functional.scaled_dot_product_attention(q, q, q)
        for dtype in (torch.float32, torch.float64):
            q = functional.scaled_dot_product_attention(q.to(dtype), q.to(dtype), q.to(dtype))
        return functional.scaled_dot_product_attention(q[..., :3], q, q[..., :3])

    with fusedformer.sdpa() as counts, pytest.raises(Exception, match="size"):
        torch.compile(f, backend="eager", fullgraph=True)(qkv()[0])
    assert counts.compiled["fused"] == 2
    assert sum("float64" in reason for reason in counts.compiled) == 1
    assert "2 in compiled code fused" in str(counts)


def test_layers_share_one_compiled_graph(fresh_compiler):
    """No part of what is compiled depends on counts, so that one layer's serves the next."""
    compiles = []

    class Layer(torch.nn.Module):
        def forward(self, x):
            return functional.scaled_dot_product_attention(x, x, x)

    layers = [Layer() for _ in range(5)]

    def backend(module, example_inputs):
        compiles.append(module)
        return module

    for layer in layers:
        layer.compile(fullgraph=True, backend=backend)
    x = torch.randn(3, 9, 2, 8).transpose(1, 2)
    with fusedformer.sdpa():
        for layer in layers * 2:
            x = layer(x)
    assert len(compiles) == 1
