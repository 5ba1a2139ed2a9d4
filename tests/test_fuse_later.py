"""What is done to a model after fuse() changed it."""

import pickle
import subprocess
import sys

import pytest
import torch
from backends import BACKENDS
from bounds import assert_within_bound
from torch import nn

from fusedformer import fuse

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


def test_unpickled_in_another_process(tmp_path):
    """Where nobody has made our attention known to transformers yet."""
    model, tokens = bert(), torch.arange(12).view(2, 6)
    fuse(model)
    expected = model(tokens).last_hidden_state.detach()
    file = tmp_path / "model.pickle"
    file.write_bytes(pickle.dumps((model, tokens, expected)))
    code = (
        "import pickle, sys, torch\n"
        "model, tokens, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert torch.equal(model(tokens).last_hidden_state, expected)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
