"""Scores against probabilities gathered by hand from the whole model's logits, in float64."""

import copy
import math

import pytest
import torch
from bounds import assert_within_bound

from fusedformer import BERT, GPT, BERTConfig, GPTConfig, Transformer, TransformerConfig
from fusedformer.transformer.score import masked_log_probs, score_text, token_log_probs

V = 31
SIZES = {"vocab_size": V, "max_length": 16, "d_model": 32, "layers": 2, "heads": 4, "d_ff": 64}


@pytest.fixture(params=["gpt", "seq2seq"])
def model(request):
    torch.manual_seed(0)
    made = (
        GPT(GPTConfig(**SIZES))
        if request.param == "gpt"
        else Transformer(TransformerConfig(**SIZES))
    )
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)  # so that probabilities differ from token to token
    return made


def by_hand(model, tokens, source=None):
    """log P of each token but the first of one row, by a call of the model for each."""
    before = () if source is None else (source[None],)
    rows = [
        model(*before, tokens[None, :i])[0, -1].log_softmax(-1)[tokens[i]]
        for i in range(1, len(tokens))
    ]
    return torch.stack(rows)


@torch.no_grad()
def test_log_probs_are_those_of_the_model(model):
    tokens = torch.randint(V, (3, 9))
    lengths, source_lengths = torch.tensor([9, 2, 5]), torch.tensor([3, 7, 1])
    source = torch.randint(V, (3, 7)) if isinstance(model, Transformer) else None
    more = {} if source is None else {"source": source, "source_lengths": source_lengths}
    found = token_log_probs(model, tokens, lengths, **more)
    exact = copy.deepcopy(model).double().eval()
    model.eval()
    for row in range(3):
        count = int(lengths[row])
        read = None if source is None else source[row, : source_lengths[row]]
        wanted = by_hand(exact, tokens[row, :count], read)
        eager = by_hand(model, tokens[row, :count], read)
        assert_within_bound(f"row {row}", found[row, : count - 1], eager, wanted)
        assert (found[row, count - 1 :] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 70])  # one call, and more than one
def test_masked_log_probs(length):
    torch.manual_seed(0)
    model = BERT(BERTConfig(**(SIZES | {"max_length": 70}))).train()
    model.token_embedding.weight.mul_(20)
    tokens, mask = torch.randint(1, V, (length,)), 0
    found = masked_log_probs(model, tokens, mask)
    assert model.training

    def one_by_one(model):
        rows = []
        for i in range(length):
            masked = tokens.clone()
            masked[i] = mask
            rows.append(model.masked_lm(model(masked[None]))[0, i].log_softmax(-1)[tokens[i]])
        return torch.stack(rows)

    exact = copy.deepcopy(model).double().eval()
    assert_within_bound("log P", found, one_by_one(model.eval()), one_by_one(exact))


class Letters:
    """A tokenizer of single letters."""

    def encode_batch(self, texts, add_special_tokens):
        return [type("", (), {"ids": [ord(letter) - 92 for letter in text]}) for text in texts]

    def decode(self, ids, skip_special_tokens):
        return "".join("<eos>" if id == 2 else chr(id + 92) for id in ids)

    def id_to_token(self, id):
        return chr(id + 92)


def test_a_texts_score():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES))
    score = score_text(model, Letters(), "face")
    wanted = token_log_probs(model, torch.tensor([[1, 10, 5, 7, 9, 2]]))[0]  # <sos> f a c e <eos>
    assert score.tokens == ["f", "a", "c", "e", "<eos>"]
    assert score.log_probs == wanted.tolist()
    assert math.isclose(score.log_prob, sum(wanted.tolist()))
    assert math.isclose(score.perplexity, math.prod(math.exp(-x) for x in wanted.tolist()) ** 0.2)


def test_right_to_left_is_the_reversed_text():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES))
    backwards = score_text(model, Letters(), "face", right_to_left=True)
    forwards = score_text(model, Letters(), "ecaf")
    assert backwards.tokens == ["<eos>", "f", "a", "c", "e"]
    assert backwards.log_probs == forwards.log_probs[::-1]
    assert backwards.log_prob != score_text(model, Letters(), "face").log_prob


def test_a_translations_and_a_masked_score():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SIZES))
    score = score_text(model, Letters(), "dead", source="beef")
    source = torch.tensor([[6, 9, 9, 10, 2]])
    wanted = token_log_probs(model, torch.tensor([[1, 8, 9, 5, 8, 2]]), source=source)
    assert score.log_probs == wanted[0].tolist()
    model = BERT(BERTConfig(**SIZES))
    score = score_text(model, Letters(), "dead")
    assert score.tokens == ["d", "e", "a", "d"]
    tokens = torch.tensor([1, 8, 9, 5, 8, 2])
    assert score.log_probs == masked_log_probs(model, tokens, 4)[1:-1].tolist()


def test_errors():
    gpt, tokens = GPT(GPTConfig(**SIZES)), torch.ones(1, 3, dtype=torch.int64)
    seq2seq, bert = Transformer(TransformerConfig(**SIZES)), BERT(BERTConfig(**SIZES))
    with pytest.raises(TypeError, match="must be a GPT or Transformer; got BERT"):
        token_log_probs(bert, tokens)
    with pytest.raises(TypeError, match="must be a BERT; got GPT"):
        masked_log_probs(gpt, tokens[0], 0)
    with pytest.raises(ValueError, match=r"tokens must be \(N,\); got \(1, 3\)"):
        masked_log_probs(bert, tokens, 0)
    for model, source in ((gpt, tokens), (seq2seq, None)):
        with pytest.raises(ValueError, match="a Transformer wants source=, and a GPT wants none"):
            token_log_probs(model, tokens, source=source)
    with pytest.raises(ValueError, match="length 2 or more"):
        token_log_probs(gpt, tokens[:, :1])
    with pytest.raises(ValueError, match="16 positions"):
        score_text(gpt, Letters(), "a" * 16)
    with pytest.raises(ValueError, match="the text is empty"):
        score_text(gpt, Letters(), "  ")
    with pytest.raises(ValueError, match="wants the source"):
        score_text(seq2seq, Letters(), "abc")
