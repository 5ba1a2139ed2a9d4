"""fuse(): what it leaves and reports, and the models that it refuses."""

import re

import pytest
import torch
from backends import BACKENDS
from fuse_cases import WIDE, Model, inputs, names
from torch import nn

import fusedformer
from fusedformer import fuse, unfuse

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="there is no C++ library here")


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
        (lambda: Subclass(WIDE), r"a class of its own, test_fuse_left\.Subclass"),
        (lambda: hooked(nn.LayerNorm(WIDE)), "hooks"),
        (lambda: replaced(nn.LayerNorm(WIDE)), "a forward of its own"),
        (lambda: nn.LayerNorm(WIDE - 1), "fewer than 512 features"),
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
        "0.attention": "a class that is not known, test_fuse_left.SelfAttn; "
        "sdpa() is for its calls of torch's attention function",
        "0.attention.norm": "a class that is not known, test_fuse_left.RootMeanSquareNorm",
        "0.norm": "a class that is not known, torch.nn.modules.batchnorm.BatchNorm1d",
    }


def test_without_kernels_all_is_left(monkeypatch):
    monkeypatch.setitem(fusedformer.kernels.dispatch.PREFERENCE, "cpu", ("reference",))
    report = fuse(Model(0.1))
    assert report.fused == []
    assert {entry.why for entry in report.left} == {"there are no fused kernels for cpu devices"}


def test_the_report_is_short():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, nn.LayerNorm(32))
    assert str(fuse(model)) == (
        "fused: 7\n"
        "    3  TransformerEncoderLayer  layers.*: dropout + residual + layer norm\n"
        "    3  MultiheadAttention       layers.*.self_attn: attention\n"
        "    1  TransformerEncoder       (model): no nested tensors\n"
        "left: 1\n"
        "    1  LayerNorm  norm: it has fewer than 512 features, and on a CPU ours is no faster "
        "there"
    )
    assert str(fuse(nn.Linear(3, 3))) == "nothing fused: the model has no module that fuse() knows"


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
