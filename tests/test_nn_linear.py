"""Linear layers of a few rows: beside float64, what others see of them, and what decoding says."""

import pytest
import torch
from backends import ROW_BACKENDS
from bounds import assert_within_bound
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fusedformer
from fusedformer import GPT, GPTConfig, generate
from fusedformer.kernels.linear import _native, linear_of_few_rows
from fusedformer.nn import linear as module
from fusedformer.nn.linear import linear, linear_layer
from fusedformer.transformer.layers import FeedForward

has_kernel = pytest.mark.skipif(
    "cpu" not in ROW_BACKENDS or _native() is None, reason="there is no kernel here, or a GPU"
)


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request):
    """Parts of the weights that do not divide them, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows(threads, dtype, bias):
    torch.manual_seed(0)
    weight = torch.randn(701, 500, dtype=dtype)
    added = torch.randn(701, dtype=dtype) if bias else None
    for shape in [(), (1,), (1, 1, 1), (2, 1), (1, 4), (5,), (17,)]:
        x = torch.randn(*shape, 500, dtype=dtype)
        with torch.no_grad():
            found = linear(x, weight, added)
            eager = functional.linear(x, weight, added)
        truth = functional.linear(x.double(), weight.double(), added.double() if bias else None)
        assert found.is_contiguous()
        assert_within_bound("linear", found, eager, truth)


def taken(x, weight, bias=None) -> bool:
    return linear_of_few_rows(x, weight, bias) is not None


@has_kernel
def test_which_calls_the_kernel_takes():
    weight, bias, row = torch.randn(300, 400), torch.randn(300), torch.randn(1, 400)
    with torch.no_grad():
        assert taken(row, weight, bias)
        assert taken(row[0], nn.Parameter(weight))
        assert taken(row.expand(2, 8, 400), weight)
        assert not taken(row.expand(17, 400), weight)
        assert not taken(row[:0], weight)
        assert not taken(row, weight.T.contiguous().T)
        assert not taken(row.double(), weight.double())
        assert not taken(row.bfloat16(), weight)
        assert not taken(row, weight, bias.bfloat16())
        assert not taken(row.to("meta"), weight.to("meta"))
        assert not taken(row[:, :40], weight[:30, :40].contiguous())  # few weights
        with fusedformer.use_backend("reference"):
            assert not taken(row, weight)
        with fusedformer.use_backend("cpu"):
            assert taken(row, weight)
    assert not taken(row, weight)
    with torch.inference_mode():
        assert taken(row, weight)


def test_no_rows_and_errors_are_torchs():
    weight = torch.randn(300, 400)
    with torch.no_grad():
        assert linear(torch.ones(0, 400), weight).shape == (0, 300)
        for x, w, b in (
            (torch.ones(1, 399), weight, None),
            (torch.ones(1, 400), weight, torch.ones(299)),
            (torch.ones(1, 400).bfloat16(), weight, None),
        ):
            with pytest.raises(RuntimeError) as ours:
                linear(x, w, b)
            with pytest.raises(RuntimeError) as torchs:
                functional.linear(x, w, b)
            assert str(ours.value) == str(torchs.value)


@torch.no_grad()
def test_what_is_no_tensor_raises_torchs_error():
    x, weight = torch.randn(1, 400), torch.randn(300, 400)
    for args, named in (((None, weight), "input"), ((x, None), "weight"), ((x, weight, 1), "bias")):
        with pytest.raises(TypeError, match=f"argument '{named}' .* must be Tensor"):
            linear(*args)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_not_dense_are_torchs():
    x, weight = torch.randn(2, 400), torch.randn(300, 400)
    for rows, matrix in (
        (x.to_sparse(), weight),
        (x.to_sparse_csr(), weight),
        (x, weight.to_sparse()),
        (x, weight.to_sparse_csr()),
        (torch.nested.nested_tensor([x]), weight),
    ):
        both = linear(rows, matrix), functional.linear(rows, matrix)
        assert torch.equal(*(y.unbind()[0] if y.is_nested else y.to_dense() for y in both))


@torch.no_grad()
def test_tangents_are_kept():
    x, tangent, weight = torch.randn(1, 400), torch.randn(1, 400), torch.randn(300, 400)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, tangent), weight)).tangent
    assert torch.equal(found, functional.linear(tangent, weight))


def test_gradients_are_torchs():
    x, weight = torch.randn(1, 600), torch.randn(500, 600, requires_grad=True)
    assert not taken(x, weight)
    linear(x, weight).sum().backward()
    assert torch.equal(weight.grad, x.expand(500, 600))


@torch.no_grad()
def test_what_looks_on_sees_torchs_linear(fresh_compiler):
    x, weight = torch.randn(1, 400), torch.randn(300, 400)
    seen = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **kwargs or {})

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **kwargs or {})

    with Functions():
        linear(x, weight)
    assert functional.linear in seen
    seen.clear()
    with Dispatched():
        linear(x, weight)
    assert any(op in seen for op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default))
    with FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * weight.numel()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    batched = torch.func.vmap(linear, (0, None))(x.expand(3, 1, 400), weight)
    torch.testing.assert_close(batched[1], functional.linear(x, weight))
    compiled = torch.compile(linear, backend="eager", fullgraph=True)(x, weight)
    assert torch.equal(compiled, functional.linear(x, weight))


def test_a_layer_that_is_more_than_its_weights_is_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.ones(1, 600)
    with torch.no_grad():
        layer = Doubled(600, 500)
        assert torch.equal(linear_layer(layer, x), layer(x))
        layer, seen = nn.Linear(600, 500), []
        linear_layer(layer, x)
        layer.register_forward_hook(lambda *args: seen.append(args))
        assert torch.equal(linear_layer(layer, x), layer(x))
        layer = nn.Linear(600, 500)
        layer.forward = lambda x: x
        assert torch.equal(linear_layer(layer, x), x)
    assert len(seen) == 2


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_every_linear_layer_of_a_block_are_called(kind):
    blocks = [
        fusedformer.nn.TransformerEncoderLayer(8, 2, 8, activation="gelu"),
        FeedForward(8, 8, "gelu"),
        FeedForward(8, 8, "relu"),
    ]
    called = []
    for block in blocks:
        layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear)]
        for layer in layers:
            getattr(layer, f"register_{kind}_hook")(lambda module, *_: called.append(module))
        block(torch.randn(3, 2, 8, requires_grad=True)).sum().backward()
        assert sorted(map(id, called)) == sorted(map(id, layers))
        called.clear()


def model(**sizes) -> GPT:
    """Layers large enough for the kernel, weights large enough that tokens differ."""
    torch.manual_seed(0)
    kind = {"d_model": 256, "heads": 4, "d_ff": 512, "layers": 1, "max_length": 40, **sizes}
    gpt = GPT(GPTConfig(vocab_size=517, **kind))
    for parameter in gpt.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return gpt


@has_kernel
@pytest.mark.parametrize("rows", [1, 3])
def test_decoding(rows, monkeypatch):
    """With the cache a step has a few rows, else many."""
    gpt, counts, original = model(), [], module.linear_of_few_rows

    def counted(*args):
        found = original(*args)
        counts.append(found is not None)
        return found

    monkeypatch.setattr(module, "linear_of_few_rows", counted)
    prompt = torch.randint(517, (rows, 17))
    tokens, _ = generate(gpt, prompt, max_new_tokens=8, temperature=0)
    assert sum(counts) == 8 + 7 * 4  # the logits, and from the second step on a layer's four
    counts.clear()
    without, _ = generate(gpt, prompt, max_new_tokens=8, temperature=0, use_cache=False)
    assert sum(counts) == 8
    assert torch.equal(tokens, without)
    assert len(tokens.unique()) > 5


@has_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_decodes_to_the_same_bits_alone_and_in_a_batch(dtype):
    gpt = model(layers=2).to(dtype).eval()
    prompts = torch.randint(517, (5, 1))

    @torch.no_grad()
    def logits(prompt):
        cache, token, found = gpt.new_cache(len(prompt), 20), prompt, []
        for _ in range(20):
            found.append(gpt(token, cache=cache)[:, -1])
            token = found[-1].argmax(-1, keepdim=True)
        return torch.stack(found)

    batch = logits(prompts)
    for row, prompt in enumerate(prompts):
        assert torch.equal(logits(prompt[None])[:, 0], batch[:, row])
