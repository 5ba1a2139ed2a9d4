"""fuse(): what it changes in a model and what it leaves, and that all of it can be undone."""

import copy
import io
import pickle
import re

import pytest
import torch
from backends import BACKENDS
from bounds import assert_within_bound
from torch import nn

import fusedformer
from fusedformer import fuse, unfuse, use_backend

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="there is no C++ library here")

WIDE = 512  # from where a layer norm by itself is fused on a CPU


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Model(nn.Module):
    """One of each that is known."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(WIDE)
        self.rms = nn.RMSNorm(WIDE, eps=1e-5)
        self.drop = nn.Dropout(dropout)
        self.attention = nn.MultiheadAttention(WIDE, 8, dropout=dropout, batch_first=True)
        layer = {"dim_feedforward": 96, "dropout": dropout, "batch_first": True}
        self.encoder = nn.TransformerEncoderLayer(WIDE, 8, activation="gelu", **layer)
        self.decoder = nn.TransformerDecoderLayer(WIDE, 8, norm_first=True, **layer)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.rand(WIDE))

    def forward(self, x, target):
        x = self.drop(self.rms(self.norm(x)))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.decoder(self.encoder(x), x, tgt_is_causal=False)
        return self.loss(x.flatten(0, 1), target.flatten())


def inputs():
    return torch.randn(2, 11, WIDE), torch.randint(WIDE, (2, 11))


def run(model, x, target):
    """The loss and all gradients as one vector."""
    x = x.to(next(model.parameters()).dtype).requires_grad_()
    loss = model(x, target)
    grads = torch.autograd.grad(loss, [x, *model.parameters()])
    return loss, torch.cat([grad.flatten() for grad in grads])


def names(entries):
    return {entry.name for entry in entries}


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
    """Its stack makes them of padded batches, in evaluation mode without gradients."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 7, 32), torch.arange(7) >= torch.tensor([[7], [4]])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        fuse(model)
        assert torch.equal(model(x, src_key_padding_mask=padding), expected)


# --- Left as they are -----------------------------------------------------------------------------


class Subclass(nn.LayerNorm):
    pass


def hooked(module):
    module.register_forward_hook(lambda module, args, output: None)
    return module


def replaced(module):
    module.forward = lambda x: x
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Subclass(WIDE), r"a class of its own, test_fuse\.Subclass"),
        (lambda: hooked(nn.LayerNorm(WIDE)), "hooks"),
        (lambda: replaced(nn.LayerNorm(WIDE)), "a forward of its own"),
        (lambda: nn.LayerNorm(WIDE - 1), "narrower than 512"),
        (lambda: nn.LayerNorm(WIDE, dtype=torch.float64), "float64"),
        (lambda: nn.Dropout(0.0), "p is 0"),
        (lambda: nn.Dropout(0.1, inplace=True), "inplace=True"),
        (lambda: nn.MultiheadAttention(600, 2), "head dimension, 300, is over 256"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.RMSNorm(WIDE)),
            "a class of its own, .*ParametrizedRMSNorm",
        ),
    ],
)
def test_a_module_is_left_with_the_reason(make, reason):
    model = nn.Sequential(make(), nn.RMSNorm(WIDE))
    kind, forward = type(model[0]), model[0].forward
    report = fuse(model)
    assert names(report.fused) == {"1"}
    (entry,) = report.left
    assert entry.name == "0"
    assert re.search(reason, entry.why), entry
    assert type(model[0]) is kind
    assert model[0].forward == forward
    unfuse(model)


def test_a_chain_with_a_part_that_is_changed_is_left_and_the_rest_fused():
    layer = nn.TransformerEncoderLayer(WIDE, 8, 96)
    hooked(layer.norm2)
    report = fuse(layer)
    left = {(entry.name, entry.why) for entry in report.left}
    assert left == {("", "its norm2 has hooks"), ("norm2", "hooks")}
    assert names(report.fused) == {"self_attn", "norm1", "dropout", "dropout1", "dropout2"}


def test_a_chain_with_a_part_of_another_class_is_left():
    layer = nn.TransformerDecoderLayer(WIDE, 8, 96, dropout=0.0)
    layer.norm3 = nn.RMSNorm(WIDE)
    report = fuse(layer)
    assert ("", "its norm3 is a RMSNorm") in {(entry.name, entry.why) for entry in report.left}
    assert type(layer) is nn.TransformerDecoderLayer


def test_modules_of_our_own_are_none_of_its_business():
    model = nn.Sequential(fusedformer.nn.LayerNorm(WIDE), nn.RMSNorm(WIDE))
    report = fuse(model)
    assert [entry.name for entry in (*report.fused, *report.left)] == ["1"]
    unfuse(model)
    assert type(model[0]) is fusedformer.nn.LayerNorm


class RootMeanSquareNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDE))


class SelfAttn(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.norm = nn.Linear(8, 8), RootMeanSquareNorm()


class AttentionBlock(nn.Module):
    """Holds what does the work, and is not reported itself."""

    def __init__(self, attention, norm):
        super().__init__()
        self.attention, self.norm = attention, norm


def test_norms_and_attentions_of_unknown_classes_are_reported():
    blocks = AttentionBlock(SelfAttn(), nn.BatchNorm1d(8)), AttentionBlock(
        nn.MultiheadAttention(8, 2), nn.RMSNorm(8)
    )
    report = fuse(nn.Sequential(*blocks))
    assert names(report.fused) == {"1.attention", "1.norm"}
    left = {entry.name: entry.why for entry in report.left}
    assert left == {
        "0.attention": "a class that is not known, test_fuse.SelfAttn; "
        "sdpa() is for its calls of torch's attention function",
        "0.attention.norm": "a class that is not known, test_fuse.RootMeanSquareNorm",
        "0.norm": "a class that is not known, torch.nn.modules.batchnorm.BatchNorm1d",
    }


def test_without_kernels_all_is_left(monkeypatch):
    monkeypatch.setitem(fusedformer.kernels.dispatch.PREFERENCE, "cpu", ("reference",))
    report = fuse(Model(0.1))
    assert report.fused == []
    assert {entry.why for entry in report.left} == {"there are no fused kernels for cpu devices"}


def test_the_report_is_short():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 3, nn.LayerNorm(32))
    assert str(fuse(model)) == (
        "fused: 6\n"
        "    3  TransformerEncoderLayer  layers.*: dropout + residual + layer norm\n"
        "    3  MultiheadAttention       layers.*.self_attn: attention\n"
        "left: 1\n"
        "    1  LayerNorm  norm: narrower than 512: measured no faster on a CPU, without dropout "
        "beside it"
    )


# --- Refused, the model unchanged -----------------------------------------------------------------


def compiled_in_place():
    model = Model()
    model.encoder.compile()
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.compile(Model()), "the model is compiled; fuse the model it was made of"),
        (compiled_in_place, "its part encoder is compiled"),
        (lambda: nn.Sequential(torch.compile(Model())), "its part 0 is compiled"),
        (lambda: torch.jit.script(nn.Sequential(nn.Dropout())), "the model is scripted"),
        (lambda: nn.DataParallel(Model()), "is wrapped in DataParallel; fuse the model, then wrap"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_model_is_refused_whole(make, message):
    model = make()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=f"^fuse: .*{message}"):
        fuse(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_sharded_model_is_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Model()
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(model.encoder, mesh=mesh)
        with pytest.raises(ValueError, match="its part encoder is sharded; fuse the model, then"):
            fuse(model)
        assert type(model.norm) is nn.LayerNorm
        with pytest.raises(ValueError, match="is wrapped in DistributedDataParallel"):
            fuse(nn.parallel.DistributedDataParallel(Model()))
        model = Model()
        fuse(model)
        fully_shard(model.encoder, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(*inputs()).backward()
        with pytest.raises(ValueError, match="as sharding gives; unfuse before that"):
            unfuse(model)
    finally:
        dist.destroy_process_group()


def test_twice():
    model = nn.Sequential(nn.Dropout())
    fuse(model)
    with pytest.raises(ValueError, match=r"fuse: its part 0 is fused already; .*unfuse\(model\)"):
        fuse(model)
    unfuse(model)
    assert type(model[0]) is nn.Dropout
    with pytest.raises(ValueError, match="unfuse: nothing in the model is fused"):
        unfuse(model)


def test_what_is_no_model():
    for function in (fuse, unfuse):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got list"):
            function([nn.Dropout()])
