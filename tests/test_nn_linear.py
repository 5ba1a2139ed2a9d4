"""Linear layers of a few rows: beside float64, and that decoding by them says the same."""

import pytest
import torch
from bounds import assert_within_bound
from torch import nn
from torch.nn import functional

from fusedformer import GPT, GPTConfig, generate
from fusedformer.nn import linear as module
from fusedformer.nn.linear import linear, linear_layer


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request):
    """Parts of the weights that do not divide them, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (1, 1, 1), (2, 1), (1, 4), (5,)], ids=str)
def test_rows(threads, shape, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 500), torch.randn(701, 500)
    added = torch.randn(701) if bias else None
    with torch.no_grad():
        found = linear(x, weight, added)
    eager = functional.linear(x, weight, added)
    truth = functional.linear(x.double(), weight.double(), added.double() if bias else None)
    assert found.is_contiguous()
    assert_within_bound("linear", found, eager, truth)


def test_a_vector_and_no_rows():
    weight = torch.randn(701, 500)
    with torch.no_grad():
        assert linear(torch.ones(500), weight).shape == (701,)
        assert linear(torch.ones(0, 500), weight).shape == (0, 701)


def test_gradients_are_torchs():
    x, weight = torch.randn(1, 600), torch.randn(500, 600, requires_grad=True)
    assert not module._few_rows(x, weight)
    with torch.no_grad():
        assert module._few_rows(x, weight)
    linear(x, weight).sum().backward()
    assert torch.equal(weight.grad, x.expand(500, 600))


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
    assert len(seen) == 2


@pytest.mark.parametrize("rows", [1, 3])
def test_decoding(rows, monkeypatch):
    """A model whose layers are large enough: with the cache a step has a few rows, else many."""
    torch.manual_seed(0)
    sizes = {"d_model": 512, "heads": 8, "d_ff": 512, "layers": 1, "max_length": 12}
    model = GPT(GPTConfig(vocab_size=517, **sizes))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    counts, original = [], module._few_rows
    monkeypatch.setattr(
        module, "_few_rows", lambda *args: counts.append(original(*args)) or counts[-1]
    )
    prompt = torch.randint(517, (rows, 5))
    tokens, _ = generate(model, prompt, max_new_tokens=8, temperature=0)
    assert sum(counts) == 8 + 7 * 4  # the logits, and from the second step on a layer's four
    counts.clear()
    without, _ = generate(model, prompt, max_new_tokens=8, temperature=0, use_cache=False)
    assert sum(counts) == 8
    assert torch.equal(tokens, without)
    assert len(tokens.unique()) > 5
