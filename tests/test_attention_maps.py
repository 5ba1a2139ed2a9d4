"""Attention weights of whole models against the formula by hand; the page, the pictures."""

import base64
import json
import math
import re
import struct

import pytest
import torch
from bounds import assert_within_bound

from fusedformer import (
    BERT,
    GPT,
    BERTConfig,
    GPTConfig,
    Transformer,
    TransformerConfig,
    ViT,
    ViTConfig,
)
from fusedformer.nn import MultiheadAttention
from fusedformer.transformer import look as look_module
from fusedformer.transformer.attention_maps import attention_weights, recorded_attention
from fusedformer.transformer.attention_page import page
from fusedformer.transformer.look import look_at_image, look_at_text
from fusedformer.transformer.words import labels, token_texts

V = 300
SIZES = {"vocab_size": V, "max_length": 24, "d_model": 32, "layers": 2, "heads": 4, "d_ff": 64}


def sharper(model):
    """Weights far from even, so that a wrong one shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "in_proj_weight" in name:
                parameter.mul_(8)
    return model


def by_hand(model, *args):
    """softmax(Q K^T / sqrt(d)) of each attention, in the order of its calls, from its inputs."""
    found, hooks = {}, []

    def hook(name):
        def record(module, inputs, kwargs):
            query, key = inputs[:2]
            (wq, wk, _), (bq, bk, _) = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
            q, k = query @ wq.T + bq, key @ wk.T + bk
            heads = module.num_heads
            q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            if kwargs.get("is_causal"):
                scores += torch.full(scores.shape[-2:], -torch.inf).triu(1)
            if (lengths := kwargs.get("key_lengths")) is not None:
                past = torch.arange(scores.shape[-1]) >= lengths[:, None]
                scores = scores.masked_fill(past[:, None, None], -torch.inf)
            kind = name.split(".")[0] + "." + name.split(".")[-1]
            found.setdefault(kind, []).append(scores.softmax(-1))

        return record

    for name, module in model.named_modules():
        if isinstance(module, MultiheadAttention):
            hooks.append(module.register_forward_pre_hook(hook(name), with_kwargs=True))
    with torch.no_grad():
        model(*args)
    for one in hooks:
        one.remove()
    return {kind: torch.stack(layers) for kind, layers in found.items()}


LENGTHS = (torch.tensor([7, 4]), torch.tensor([5, 2]))


@pytest.mark.parametrize(
    ("model", "args", "kinds"),
    [
        (GPT(GPTConfig(**SIZES)), (torch.randint(V, (2, 7)), LENGTHS[0]), ["stack.self_attention"]),
        (
            BERT(BERTConfig(**SIZES)),
            (torch.randint(V, (2, 7)), None, LENGTHS[0]),
            ["encoder.self_attention"],
        ),
        (
            Transformer(TransformerConfig(**SIZES, share_layers=True)),
            (torch.randint(V, (2, 7)), torch.randint(V, (2, 5)), *LENGTHS),
            ["encoder.self_attention", "decoder.self_attention", "decoder.cross_attention"],
        ),
    ],
    ids=["gpt", "bert", "transformer"],
)
def test_weights_are_the_formulas(model, args, kinds):
    model = sharper(model).eval()
    found = attention_weights(model, *args)
    assert sorted(found) == sorted(kinds)
    eager, exact = by_hand(model, *args), by_hand(model.double(), *args)
    model.float()
    for kind in kinds:
        assert found[kind].shape[:3] == (2, 2, 4)  # layers, rows, heads
        assert_within_bound(kind, found[kind], eager[kind], exact[kind])
        assert found[kind].std() > 0.05  # far from even


def test_recording_changes_nothing():
    model = GPT(GPTConfig(**SIZES)).train()
    tokens = torch.randint(V, (1, 5))
    with torch.no_grad():
        alone = model.eval()(tokens)
        with recorded_attention(model) as found:
            recorded = model(tokens)
        assert torch.equal(alone, recorded)
        assert len(found) == 2
        model(tokens)
        assert len(found) == 2
    model.train()
    attention_weights(model, tokens)
    assert model.training


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("tokenizers")
    from fusedformer.transformer.data import train_tokenizer

    return train_tokenizer(["the cat sat on the mat, 고양이 </script> $a$"] * 3, V)


MODELS = {
    "transformer": lambda: Transformer(TransformerConfig(**SIZES)),
    "gpt": lambda: GPT(GPTConfig(**SIZES)),
    "rotary gpt": lambda: GPT(GPTConfig(**SIZES, rotary=True)),
    "bert": lambda: BERT(BERTConfig(**SIZES)),
}


@pytest.fixture(scope="module", params=MODELS)
def look(request, tokenizer):
    torch.manual_seed(1)
    model = sharper(MODELS[request.param]()).eval()
    target = "the mat" if request.param == "transformer" else None
    return model, look_at_text(model, tokenizer, " the cat", target)


def test_look(look, tokenizer):
    model, found = look
    names = {"Transformer": ["encoder", "decoder", "cross"], "GPT": ["self"], "BERT": ["encoder"]}
    assert [one.name for one in found.attentions] == names[type(model).__name__]
    for one in found.attentions:
        assert one.weights.shape == (2, 4, len(one.queries), len(one.keys))
        assert torch.allclose(one.weights.sum(-1), torch.ones(()), atol=1e-6)
    if isinstance(model, Transformer):
        encoder, decoder, cross = found.attentions
        assert encoder.queries == encoder.keys == cross.keys
        assert encoder.queries[-1] == "<eos>"
        assert decoder.queries == decoder.keys == cross.queries
        assert decoder.queries[0] == "<sos>"
        assert [one.target for one in found.predictions][-1] == "<eos>"
    assert found.positions.shape[0] == SIZES["max_length"]


@torch.no_grad()
def test_predictions_are_the_models(look, tokenizer):
    model, found = look
    ids = tokenizer.encode(" the cat").ids
    if isinstance(model, Transformer):
        target = tokenizer.encode("the mat").ids
        logits = model(torch.tensor([[*ids, 2]]), torch.tensor([[1, *target]]))[0]
        targets = [*target, 2]
    elif isinstance(model, GPT):
        logits, targets = model(torch.tensor([[1, *ids]]))[0, :-1], ids
    else:
        rows = []
        for i in range(len(ids)):
            masked = [1, *ids, 2]
            masked[i + 1] = 4
            rows.append(model.masked_lm(model(torch.tensor([masked])))[0, i + 1])
        logits, targets = torch.stack(rows), ids
    probs = logits.softmax(-1)
    assert len(found.predictions) == len(targets)
    for one, row, id in zip(found.predictions, probs, targets, strict=True):
        assert one.target == labels(tokenizer, [id])[0]
        assert math.isclose(one.target_after, row[id], rel_tol=1e-4)
        top = row.topk(5)
        assert [word for word, _ in one.after] == labels(tokenizer, top.indices.tolist())
        assert [p for _, p in one.after] == pytest.approx(top.values.tolist(), rel=1e-4)
        assert one.before != one.after


def test_a_right_to_left_model_reads_the_end_first(tokenizer):
    torch.manual_seed(1)
    model = GPT(GPTConfig(**SIZES))
    found = look_at_text(model, tokenizer, "the cat", right_to_left=True)
    words = look_at_text(model, tokenizer, "the cat").attentions[0].queries
    assert found.attentions[0].queries == [words[0], *words[:0:-1]]
    assert "right to left" in found.about


def test_image():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "layers": 2, "heads": 4, "d_ff": 64}
    model = ViT(ViTConfig(**sizes, image_size=8, patch_size=4, channels=1, classes=3))
    found = look_at_image(model, torch.randn(1, 8, 8), "digit.png")
    assert found.attentions[0].queries == ["class", "1,1", "1,2", "2,1", "2,2"]
    assert found.attentions[0].weights.shape == (2, 4, 5, 5)
    assert "digit.png" in page(found)


def test_page_holds_all_and_loads_nothing(look):
    _, found = look
    text = page(found)
    addresses = set(re.findall(r"https?://[^\"'\s<]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not a place
    assert not re.search(r"<(link|script|img)[^>]*(src|href)=\"(?!data:)", text)
    data = json.loads(re.search(r'id="look">(.*?)</script>', text, re.DOTALL)[1])
    for one, held in zip(found.attentions, data["attentions"], strict=True):
        assert (held["queries"], held["keys"]) == (one.queries, one.keys)
        raw = base64.b64decode(held["values"])
        values = torch.tensor(struct.unpack(f"<{len(raw) // 2}H", raw)) / 65535
        assert (values - one.weights.flatten()).abs().max() <= 0.5 / 65535 + 1e-7


def test_text_cannot_end_the_script(tokenizer):
    words = "</script><!--<u>&"
    text = page(look_at_text(GPT(GPTConfig(**SIZES)), tokenizer, words))
    assert text.count("</script>") == 2
    assert "<!--" not in text
    assert "<u>" not in text
    data = re.search(r'id="look">(.*?)</script>', text, re.DOTALL)[1]
    assert "".join(json.loads(data)["attentions"][0]["keys"][1:]) == words


def test_pictures(look, tmp_path):
    pytest.importorskip("matplotlib")
    from fusedformer.transformer.attention_pictures import write_pictures

    _, found = look
    written, _ = write_pictures(found, tmp_path)
    names = [path.name for path in written]
    assert len(names) == len(set(names)) == 2 * len(found.attentions) + 2
    assert {"positions.png", "predictions.png"} <= set(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_tokens_as_text(tokenizer):
    """Spaces are kept, or made visible; a part of a character is shown as its bytes."""
    ids = tokenizer.encode("the €\n").ids
    assert token_texts(tokenizer, ids)[0] == "the"
    assert token_texts(tokenizer, ids)[-4:] == ["<E2>", "<82>", "<AC>", "\n"]
    assert labels(tokenizer, tokenizer.encode(" \n").ids)[-1] == "⏎"
    assert labels(tokenizer, tokenizer.encode(" cat").ids[:1]) == ["cat"]
    assert labels(tokenizer, tokenizer.encode(" ").ids) == ["␣"]


def test_errors(tokenizer, monkeypatch):
    gpt = GPT(GPTConfig(**SIZES))
    with pytest.raises(ValueError, match="the text is empty"):
        look_at_text(gpt, tokenizer, " ")
    with pytest.raises(ValueError, match="only a Transformer has a target"):
        look_at_text(gpt, tokenizer, "a", target="b")
    with pytest.raises(ValueError, match="24 positions"):
        look_at_text(gpt, tokenizer, "a b " * 30)
    monkeypatch.setattr(look_module, "MAX_WORDS", 3)
    with pytest.raises(ValueError, match="4 tokens are too many to draw, over 3"):
        look_at_text(gpt, tokenizer, "zzz")
