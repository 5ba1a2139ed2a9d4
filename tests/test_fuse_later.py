"""What is done to a model after fuse() changed it."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from backends import BACKENDS
from bounds import assert_within_bound
from torch import nn

from fusedformer import fuse, unfuse

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="there is no C++ library here")

OPTIONS = {"dim_feedforward": 96, "dropout": 0.0, "batch_first": True}


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    return transformers.BertModel(
        transformers.BertConfig(vocab_size=50, num_hidden_layers=1, **sizes)
    ).eval()


def register(module, kind, called):
    """A hook of one kind on a module, which notes its name."""

    def hook(*args):
        called.append(kind)

    getattr(module, f"register_{kind}_hook")(hook)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("name", ["norm1", "norm2", "dropout", "dropout1", "dropout2"])
def test_hooks_on_parts_of_torchs_layers_are_called(name, kind):
    torch.manual_seed(0)
    x = torch.randn(2, 7, 64, requires_grad=True)
    layers = {
        nn.TransformerEncoderLayer(64, 4, **OPTIONS): (x,),
        nn.TransformerDecoderLayer(64, 4, **OPTIONS): (x, x),
    }
    for layer, inputs in layers.items():
        fuse(layer)
        called: list[str] = []
        register(getattr(layer, name), kind, called)
        layer(*inputs).sum().backward()
        assert called == [kind], type(layer)


@pytest.mark.parametrize("name", ["dropout", "LayerNorm"])
def test_hooks_on_parts_of_berts_layers_are_called(name):
    model = bert()
    fuse(model)
    called: list[str] = []
    register(getattr(model.encoder.layer[0].output, name), "forward", called)
    model(torch.arange(12).view(2, 6))
    assert called == ["forward"]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", ["dropout", "dropout1", "dropout2", "dropout3"])
def test_a_dropout_is_its_own_sublayers(name, norm_first):
    """One that drops all, the others nothing: that is no matter of chance."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 64)
    layers = {nn.TransformerDecoderLayer(64, 4, norm_first=norm_first, **OPTIONS): (x, x)}
    if name != "dropout3":
        layers[nn.TransformerEncoderLayer(64, 4, norm_first=norm_first, **OPTIONS)] = (x,)
    for layer, inputs in layers.items():
        getattr(layer, name).p = 1.0
        check_fused(layer, inputs)


@pytest.mark.parametrize("name", ["output", "attention.output"])
def test_berts_dropout_is_the_sublayers(name):
    part = bert().encoder.layer[0].get_submodule(name).train()
    part.dropout.p = 1.0
    check_fused(part, (torch.randn(2, 7, part.dense.in_features), torch.randn(2, 7, 64)))


def check_fused(module, inputs):
    """Fused, it computes what it did."""
    eager = module(*inputs)
    truth = copy.deepcopy(module).double()(*(x.double() for x in inputs))
    fuse(module)
    assert_within_bound("output", module(*inputs), eager, truth)


def test_a_hook_that_is_added_changes_no_result():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, **OPTIONS)
    x = torch.randn(2, 7, 64)
    eager = layer(x)
    truth = layer.double()(x.double())
    layer.float()
    fuse(layer)
    layer.norm1.register_forward_hook(lambda *args: None)
    assert_within_bound("output", layer(x), eager, truth)


def test_parts_are_copied():
    model, x = bert(), torch.randn(2, 6, 64)
    fuse(model)
    report = fuse(bert().encoder)
    (left,) = {entry.why for entry in report.left if entry.kind == "BertSelfAttention"}
    assert left == "without its model, whose attention is switched as a whole"
    part = model.encoder.layer[0]
    for again in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert torch.equal(again(x), part(x))
        unfuse(again)
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, **OPTIONS), 1)
    fuse(layer)
    for part in (layer.layers[0], layer.layers[0].self_attn):
        for again in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
            assert type(again) is type(part)
            unfuse(again)


def test_loaded_in_another_process(tmp_path):
    """A part before all else, where nobody has made our attention known to transformers yet."""
    model, tokens, x = bert(), torch.arange(12).view(2, 6), torch.randn(2, 6, 64)
    fuse(model)
    part = model.encoder.layer[0]
    (tmp_path / "part").write_bytes(pickle.dumps((part, x, part(x).detach())))
    torch.save((model, tokens, model(tokens).last_hidden_state.detach()), tmp_path / "whole")
    code = (
        "import pickle, sys, torch\n"
        "part, x, expected = pickle.load(open(sys.argv[1] + '/part', 'rb'))\n"
        "assert torch.equal(part(x), expected)\n"
        "model, x, expected = torch.load(sys.argv[1] + '/whole', weights_only=False)\n"
        "assert torch.equal(model(x).last_hidden_state, expected)\n"
        "from fusedformer import unfuse\n"
        "unfuse(model)\n"
        "assert model.config._attn_implementation == 'sdpa'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_global_hooks_see_what_is_called():
    """As fuse()'s docstring has it: not the norms and dropouts of a layer that does their work."""
    layer = nn.TransformerEncoderLayer(64, 4, **OPTIONS)
    fuse(layer)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(module)
    )
    try:
        layer(torch.randn(2, 7, 64))
    finally:
        handle.remove()
    assert {layer, layer.self_attn, layer.linear2} <= set(seen)
    assert not {layer.norm1, layer.norm2, layer.dropout1, layer.dropout2} & set(seen)
