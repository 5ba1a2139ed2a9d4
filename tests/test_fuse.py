"""fuse(): what it changes in a model and what it leaves, and that all of it can be undone."""

import copy
import io
import pickle
from statistics import NormalDist

import pytest
import torch
from backends import BACKENDS
from bounds import assert_within_bound
from fuse_cases import WIDE, Model, inputs, names, run
from torch import nn

import fusedformer.nn
from fusedformer import fuse, unfuse, use_backend

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="there is no C++ library here")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- Fused, and as before -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_that_is_known_is_fused_and_the_same(dtype):
    truth, args = Model().double(), inputs()
    eager = copy.deepcopy(truth).to(dtype)
    model = copy.deepcopy(eager)
    model.drop.p = 0.5
    report = fuse(model)
    assert names(report.fused) == {
        "norm", "rms", "drop", "attention", "loss", "encoder", "encoder.self_attn",
        "decoder", "decoder.self_attn", "decoder.multihead_attn",
    }  # fmt: skip
    model.drop.p = 0.0
    for label, *values in zip(
        ("loss", "gradients"), run(model, *args), run(eager, *args), run(truth, *args), strict=True
    ):
        assert_within_bound(label, *values)


def test_dropout_is_that_of_the_reference():
    model, args = Model(0.3), inputs()
    fuse(model)
    exact = copy.deepcopy(model).double()
    results = []
    for one, backend in ((model, "cpu"), (model, "reference"), (exact, "reference")):
        torch.manual_seed(5)
        with use_backend(backend):
            results.append(run(one, *args))
    for label, *values in zip(("loss", "gradients"), *results, strict=True):
        assert_within_bound(label, *values)
    torch.manual_seed(6)
    assert not torch.equal(run(model, *args)[0], results[0][0])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_dropout_is_the_originals_in_distribution(norm_first, activation):
    """The mean and the mean square of every output, over many draws, beside the original's."""
    layer = nn.TransformerDecoderLayer(
        16, 2, 32, 0.3, activation, norm_first=norm_first, batch_first=True
    )
    draws = [x.expand(4000, -1, -1) for x in torch.randn(2, 1, 3, 16)]
    found = []
    with torch.no_grad():
        found.append(layer(*draws).double())
        fuse(layer)
        found.append(layer(*draws).double())
    # What differs as little by chance alone but for once in a million runs.
    limit = NormalDist().inv_cdf(1 - 0.5e-6 / (2 * found[0][0].numel()))
    for power in (1, 2):
        means = [(x**power).mean(0) for x in found]
        errors = [(x**power).var(0) / len(x) for x in found]
        assert ((means[0] - means[1]) / (errors[0] + errors[1]).sqrt()).abs().max() < limit


def test_dropout_modules_keep_the_say():
    """Monte Carlo dropout: a model in evaluation mode but for its dropouts."""
    model = nn.TransformerEncoderLayer(WIDE, 8, 96, dropout=0.5, batch_first=True)
    fuse(model)
    x = inputs()[0]
    model.eval()
    still = model(x)
    assert torch.equal(model(x), still)
    model.dropout1.train()
    assert not torch.equal(model(x), still)
    model.dropout1.p = 0.0
    assert torch.equal(model(x), still)


def test_the_very_same_objects():
    model = Model(0.1)

    def objects():
        kinds = model.named_modules(), model.named_parameters(), model.named_buffers()
        return [dict(kind) for kind in kinds]

    before = objects()
    classes = {name: type(module) for name, module in before[0].items()}
    keys = list(model.state_dict())
    model.eval()
    model.norm.train()
    model.rms.weight.requires_grad_(False)
    fuse(model)
    fused = {name for name, module in model.named_modules() if type(module) is not classes[name]}
    assert {"norm", "encoder.self_attn", "decoder", "loss"} <= fused
    assert all(isinstance(module, classes[name]) for name, module in model.named_modules())
    assert list(model.state_dict()) == keys
    unfuse(model)
    for kept, now in zip(before, objects(), strict=True):
        assert kept.keys() == now.keys()
        assert all(kept[name] is now[name] for name in kept)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert model.norm.training
    assert not model.drop.training
    assert not model.rms.weight.requires_grad


def test_saved_loaded_copied_pickled():
    model, args = Model(), inputs()
    plain = copy.deepcopy(model)
    fuse(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    loss = model(*args)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(other(*args), loss)
        assert type(other.encoder) is type(model.encoder)
        unfuse(other)
    plain.load_state_dict(model.state_dict())
    unfuse(model)
    assert torch.equal(plain(*args), model(*args))


def test_a_model_that_is_moved_after_it_was_fused():
    with torch.device("meta"):
        model = Model()
    report = fuse(model)
    assert "attention" in names(report.fused)
    model.to_empty(device="cpu")
    model.load_state_dict(Model().state_dict())
    assert model(*inputs()).isfinite()


@pytest.mark.slow
def test_compile_is_one_graph(fresh_compiler):
    model, args = Model(0.1), inputs()
    fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for one in (model, compiled):
        torch.manual_seed(1)
        results.append(run(one, *args))
    exact = copy.deepcopy(model).double()
    torch.manual_seed(1)
    with use_backend("reference"):
        exact = run(exact, *args)
    for label, eager, ours, truth in zip(("loss", "gradients"), *results, exact, strict=True):
        assert_within_bound(label, ours, eager, truth)


def test_autocast():
    model, args = Model(), inputs()
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = run(model, *args), run(plain, *args)
    for label, *values in zip(("loss", "gradients"), ours, eager, run(exact, *args), strict=True):
        assert values[0].dtype == values[1].dtype
        assert_within_bound(label, *values)


# --- Calls that go back to torch ------------------------------------------------------------------


def test_attention_that_wants_its_weights_is_torchs():
    layer = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 5, 32)
    out, weights = layer(x, x, x)
    fuse(layer)
    again = layer(x, x, x)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], weights)


def test_losses_of_other_kinds_are_torchs():
    loss = nn.CrossEntropyLoss()
    cases = [
        (torch.randn(3, 7), torch.rand(3, 7).softmax(1)),
        (torch.randn(3, 7, 5), torch.randint(7, (3, 5))),
        (torch.randn(3, 7), torch.randint(7, (3,), dtype=torch.uint8)),
    ]
    expected = [loss(*case) for case in cases]
    fuse(loss)
    assert [loss(*case) for case in cases] == expected


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_torchs():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    nested = torch.nested.nested_tensor([torch.randn(7, 32), torch.randn(4, 32)])
    with torch.no_grad():
        expected = layer(nested).to_padded_tensor(0.0)
        fuse(layer)
        assert torch.equal(layer(nested).to_padded_tensor(0.0), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_batches_of_an_encoder_stay_dense_in_evaluation(monkeypatch):
    """Torch's encoder makes nested tensors of them."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    truth = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32)).double().eval()
    eager = copy.deepcopy(truth).float()
    model = copy.deepcopy(eager)
    fuse(model)
    calls = []
    op = fusedformer.nn.attention.attention
    monkeypatch.setattr(
        fusedformer.nn.attention, "attention", lambda *a, **k: calls.append(1) or op(*a, **k)
    )
    x, padding = torch.randn(2, 7, 32), torch.arange(7) >= torch.tensor([[7], [4]])
    with torch.no_grad():
        ours, plain, exact = (
            one(x.to(one.norm.weight.dtype), src_key_padding_mask=padding)[~padding]
            for one in (model, eager, truth)
        )
        assert len(calls) == 2
        assert_within_bound("kept positions", ours, plain, exact)
        model = pickle.loads(pickle.dumps(model))
        assert not model.use_nested_tensor
        model.use_nested_tensor = True
        assert not model.use_nested_tensor
        unfuse(model)
        assert model.use_nested_tensor
        expected = eager(x, src_key_padding_mask=padding)
        assert torch.equal(model(x, src_key_padding_mask=padding), expected)


def test_an_encoder_whose_layers_are_left_may_make_nested_tensors():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.1)
    model = nn.TransformerEncoder(layer, 2)
    for one in model.layers:
        one.norm1.register_forward_hook(lambda module, args, output: None)
    fuse(model)
    assert model.use_nested_tensor
