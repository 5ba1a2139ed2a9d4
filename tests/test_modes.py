"""Every public op and module under what PyTorch offers beside compilers: one test for each mode."""

import collections
import copy
import functools
import io
import pickle
import subprocess
import sys
import warnings

import numpy
import pytest
import torch
from mode_cases import CASES, CLASSES, HEADS, WIDTH, Call, results
from torch.autograd import forward_ad
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import fusedformer
from fusedformer.kernels import dispatch

pytestmark = [
    pytest.mark.usefixtures("on_device"),
    pytest.mark.filterwarnings("ignore:MultiheadAttention. need_weights"),
    # vmap's, of ops that it calls for each sample.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

nn = fusedformer.nn
every = pytest.mark.parametrize("name", CASES)


def make(name: str, batch: int = 3, length: int = 7) -> tuple[torch.nn.Module, tuple]:
    torch.manual_seed(0)
    module, inputs = CASES[name]
    return module(), inputs(batch, length)


def test_every_public_op_and_module_is_a_case():
    assert {name.split(" ")[0] for name in CASES} == {
        *dispatch.OPS, *dispatch.PART_OF, *nn.__all__
    }  # fmt: skip


# --- Copies, files, devices -----------------------------------------------------------------------


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), saved_and_loaded]
)
@pytest.mark.parametrize("name", [name for name in CASES if name[0].isupper()])
def test_copies_compute_the_same(name, again):
    module, inputs = make(name)
    expected = results(module, inputs)
    for found, wanted in zip(results(again(module), inputs), expected, strict=True):
        assert torch.equal(found, wanted)


@every
def test_meta_tensors_get_shapes_and_dtypes(name):
    module, inputs = make(name)
    expected = results(module, inputs)
    with torch.device("meta"):
        found = results(module.to("meta"), tuple(x.to("meta") for x in inputs))
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]
    assert {t.device.type for t in found} == {"meta"}


def test_modules_are_made_on_a_device_and_in_a_dtype():
    layer = nn.TransformerDecoderLayer(8, 2, 16, device="meta", dtype=torch.bfloat16)
    loss = nn.LinearCrossEntropyLoss(8, 5, device="meta", dtype=torch.bfloat16)
    for parameter in (*layer.parameters(), *loss.parameters()):
        assert parameter.device.type == "meta"
        assert parameter.dtype == torch.bfloat16
    layer.to_empty(device="cpu")


# --- Autocast -------------------------------------------------------------------------------------

# Matrix products and attention come out in 16 bits, losses in float32; the rest keeps its dtype.
BFLOAT16 = ("attention", "scaled_dot_product_attention")


@every
def test_autocast(name):
    module, inputs = make(name)
    device = inputs[0].device.type
    with torch.autocast(device, torch.bfloat16):
        outputs = module(*inputs)
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        wide = name not in BFLOAT16 and "Multihead" not in name
        assert output.dtype == (torch.float32 if wide else torch.bfloat16)
        if output.requires_grad:
            output.float().sum().backward(retain_graph=True)
    for parameter in module.parameters():
        assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", ["Encoder", "Decoder"])
def test_layers_have_torchs_dtypes_under_autocast(name, norm_first):
    """And its values, as far as 16 bits go: the error is at most twice that of torch's layer."""
    options = {"dim_feedforward": 2 * WIDTH, "dropout": 0.0, "norm_first": norm_first}
    ours, theirs = (
        getattr(m, f"Transformer{name}Layer")(WIDTH, HEADS, **options) for m in (nn, torch.nn)
    )
    ours.load_state_dict(theirs.state_dict())
    inputs = [torch.randn(40, 8, WIDTH) for _ in range(2 if name == "Decoder" else 1)]
    truth = theirs(*inputs)
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        found, expected = ours(*inputs), theirs(*inputs)
    assert found.dtype == expected.dtype == torch.float32
    assert (found - truth).abs().max() <= 2 * (expected - truth).abs().max()


# --- Checkpointing and determinism ----------------------------------------------------------------


@every
def test_checkpointing_drops_the_same_again(name):
    module, inputs = make(name)
    expected = results(module, inputs)

    for reentrant in (False, True):
        again = Call(functools.partial(checkpoint, module, use_reentrant=reentrant))
        again.module = module  # for its parameters
        for found, wanted in zip(results(again, inputs), expected, strict=True):
            assert torch.equal(found, wanted)


def test_selective_checkpointing_can_keep_attention(monkeypatch):
    """Its op is one that a policy can name; what is kept is not computed again."""
    module, inputs = make("TransformerEncoderLayer")
    expected = results(module, inputs)
    runs = collections.Counter()
    pick = dispatch.pick
    monkeypatch.setattr(dispatch, "pick", lambda op, *args: runs.update([op]) or pick(op, *args))
    monkeypatch.setattr(dispatch, "straight_to_cpu", lambda *args: None)  # it would not be counted

    def policy(context, op, *args, **kwargs):
        keep = op is torch.ops.fusedformer.attention_fwd.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    for options, attentions in (({}, 3), ({"context_fn": contexts}, 2)):
        runs.clear()
        call = Call(functools.partial(checkpoint, module, use_reentrant=False, **options))
        call.module = module
        for found, wanted in zip(results(call, inputs), expected, strict=True):
            assert torch.equal(found, wanted)
        assert runs["attention"] == attentions
        assert runs["bias_activation"] == 3


@pytest.mark.usefixtures("poisoned_memory")
@every
def test_deterministic_algorithms(name):
    module, inputs = make(name)
    for found, wanted in zip(results(module, inputs), results(module, inputs), strict=True):
        assert torch.equal(found, wanted)
        assert found.isfinite().all()


# --- torch.func -----------------------------------------------------------------------------------


# Functions that drop at inference, too: a module's eval() does not reach them.
DROPPING = ("attention", "scaled_dot_product_attention", "dropout", "bias_activation")
DROPPING += ("dropout_add_layer_norm",)


def as_function(module):
    """The sum of squares of a module's outputs, as a function of its parameters and inputs."""

    def function(parameters, *inputs):
        outputs = torch.func.functional_call(module, parameters, inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum(output.square().sum() for output in outputs)

    return function


@every
def test_func_grad_is_autograds(name):
    module, inputs = make(name)
    parameters = {k: v.detach() for k, v in module.named_parameters()}
    function = as_function(module)
    torch.manual_seed(5)
    grads = torch.func.grad(function, (0, 1))(parameters, *inputs)
    torch.manual_seed(5)
    leaf = inputs[0].clone().requires_grad_()
    function(dict(module.named_parameters()), leaf, *inputs[1:]).backward()
    assert torch.equal(grads[1], leaf.grad)
    for key, parameter in module.named_parameters():
        assert torch.equal(grads[0][key], parameter.grad)


@pytest.mark.parametrize("name", [name for name in CASES if name not in DROPPING])
def test_vmap_of_grad_is_the_gradient_of_each_sample(name):
    module, inputs = make(name)
    module = module.eval()
    parameters = {k: v.detach() for k, v in module.named_parameters()}
    samples = tuple(x[:, None] for x in inputs)
    grad = torch.func.grad(as_function(module), (0, 1))
    axes = (None, *(0 for _ in samples))
    found = torch.func.vmap(grad, in_dims=axes)(parameters, *samples)
    for i in range(len(inputs[0])):
        expected = grad(parameters, *(x[i] for x in samples))
        assert torch.equal(found[1][i], expected[1])
        for key in parameters:
            assert torch.equal(found[0][key][i], expected[0][key])


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("name", [*DROPPING, "Dropout"])
def test_vmap_draws_as_it_is_told(name, randomness):
    module, inputs = make(name)
    samples = [x[:1].expand(3, -1, -1)[:, None] for x in inputs]
    with torch.no_grad():
        found = torch.func.vmap(module, randomness=randomness)(*samples)
    found = found[0] if isinstance(found, tuple) else found
    assert torch.equal(found[0], found[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(module)(*samples)


@every
def test_forward_mode_raises(name):
    """It would take a function for a constant otherwise."""
    module, inputs = make(name)
    tangent = torch.ones_like(inputs[0])
    with pytest.raises(NotImplementedError, match="fusedformer has no forward-mode"):
        torch.func.jvp(lambda x: module(x, *inputs[1:]), (inputs[0],), (tangent,))
    with (
        torch.no_grad(),
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=r"use reverse mode \(torch.func.vjp, jacrev\)"),
    ):
        module(forward_ad.make_dual(inputs[0], tangent), *inputs[1:])


@pytest.mark.parametrize("name", sorted(set(CASES) - {"dropout", "Dropout"}))  # these are linear
def test_second_derivatives_raise(name):
    """Of a loss, too, whose upstream gradient needs none: a Hessian would silently lack the op."""
    module, inputs = make(name)
    x = inputs[0].requires_grad_()

    def loss(x):
        out = module(x, *inputs[1:])
        return (out[0] if isinstance(out, tuple) else out).sum()

    torch.manual_seed(1)
    (wanted,) = torch.autograd.grad(loss(x), x)
    torch.manual_seed(1)
    (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
    assert torch.equal(grad, wanted)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad((grad * wanted).sum() + x.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    grad.mul_(2)  # as who clips gradients does
    assert torch.equal(grad, 2 * wanted)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x.detach())


# --- Counting -------------------------------------------------------------------------------------


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_counted_as_torch_counts_it(heads, causal):
    query = torch.randn(2, heads[0], 5, 8, requires_grad=True)
    key = torch.randn(2, heads[1], 7, 8, requires_grad=True)
    shapes = [tuple(t.shape) for t in (query, key, key)]
    forward = sdpa_flop_count(*shapes)
    assert forward == 2 * (2 * 2 * 4 * 5 * 7 * 8)
    assert flops(lambda: fusedformer.attention(query, key, key, causal=causal)) == forward
    both = flops(lambda: fusedformer.attention(query, key, key, causal=causal).sum().backward())
    assert both == forward + sdpa_backward_flop_count(shapes[0], *shapes)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_is_counted_as_its_parts(reduction):
    x, weight = torch.randn(6, WIDTH), torch.randn(CLASSES, WIDTH)
    target = torch.randint(CLASSES, (6,))
    bias = torch.zeros(CLASSES, requires_grad=True)  # its gradient is no product
    product = 2 * 6 * WIDTH * CLASSES

    def fused(x, weight):
        options = {"linear_bias": bias, "reduction": reduction}
        return fusedformer.linear_cross_entropy(x, weight, target, **options).sum()

    def parts(x, weight):
        logits = torch.nn.functional.linear(x, weight, bias)
        return torch.nn.functional.cross_entropy(logits, target, reduction=reduction).sum()

    assert flops(lambda: fused(x, weight)) == flops(lambda: parts(x, weight)) == product
    x.requires_grad_()
    again = product if reduction == "none" else 0  # the logits, which were not kept
    for _ in range(2):
        expected = flops(lambda: parts(x, weight).backward())
        assert flops(lambda: fused(x, weight).backward()) == expected + again
        weight.requires_grad_()


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        "import fusedformer",
        "import torch.utils.flop_counter, fusedformer",
        # Asked for, but not imported yet.
        "import fusedformer, importlib.util\nimportlib.util.find_spec('torch.utils.flop_counter')",
        "import fusedformer, importlib, torch.utils.flop_counter as counter\n"
        "importlib.reload(counter)",
    ],
)
def test_counted_in_a_fresh_process(before):
    code = f"""
{before}
import torch
from torch.utils.flop_counter import FlopCounterMode
x = torch.randn(1, 1, 2, 2, requires_grad=True)
with FlopCounterMode(display=False) as counter:
    fusedformer.attention(x, x, x).sum().backward()
assert counter.get_total_flops() == 32 + 80
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("real", [numpy.float32, numpy.float64, numpy.float16])
@pytest.mark.parametrize("integer", [numpy.int64, numpy.int32, numpy.uint8])
def test_numbers_may_be_numpys(real, integer):
    x, target = torch.randn(6, WIDTH), torch.randint(WIDTH, (6,))
    heads = x[None, None]
    runs = []
    for p, eps, seed, index in ((0.5, 0.25, 3, 2), (real(0.5), real(0.25), integer(3), integer(2))):
        options = {"seed": seed, "dropout_p": p}
        runs.append(
            [
                fusedformer.dropout(x, p, seed=seed),
                fusedformer.dropout_add_layer_norm(x, eps=eps, **options),
                fusedformer.bias_activation(x, **options),
                fusedformer.attention(heads, heads, heads, scale=eps, **options),
                fusedformer.cross_entropy(x, target, ignore_index=index, label_smoothing=eps),
                fusedformer.linear_cross_entropy(x, x, target % 6, ignore_index=index),
            ]
        )
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    with pytest.raises(TypeError, match="p must be a number from 0 to 1"):
        fusedformer.dropout(x, numpy.bool_(True))
    with pytest.raises(TypeError, match="seed must be an int"):
        fusedformer.dropout(x, 0.5, seed=numpy.float32(1))


def test_nothing_is_warned_of():
    """Where the weights of attention are not asked for."""
    for name in ("TransformerEncoderLayer", "TransformerDecoderLayer", "CrossEntropyLoss"):
        module, inputs = make(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            results(module, inputs)
