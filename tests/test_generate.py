"""Generation against a loop over the model, one row at a time; the cache against no cache."""

import itertools
import math

import pytest
import torch

from fusedformer import BERT, GPT, BERTConfig, GPTConfig, Transformer, TransformerConfig
from fusedformer.transformer.generate import generate

V, START, END = 29, 1, 2
SIZES = {"vocab_size": V, "max_length": 48, "d_model": 32, "layers": 2, "heads": 4, "d_ff": 64}

MODELS = {
    "gpt": lambda: GPT(GPTConfig(**SIZES)),
    "gpt rotary, shared layers": lambda: GPT(GPTConfig(**SIZES, rotary=True, share_layers=True)),
    "seq2seq": lambda: Transformer(TransformerConfig(**SIZES, share_embeddings=False)),
    "seq2seq prenorm": lambda: Transformer(
        TransformerConfig(**SIZES, share_embeddings=False, prenorm=True)
    ),
}

WAYS = {
    "greedy": {"temperature": 0},
    "sampling": {"seed": 3, "temperature": 1.2},
    "top-k and top-p": {"seed": 4, "top_k": 12, "top_p": 0.9},
    "beam search": {"num_beams": 3, "length_penalty": 0.6},
}


@pytest.fixture(params=MODELS)
def model(request):
    """With large random weights: as models begin, they would say one token over and over."""
    torch.manual_seed(7)
    made = MODELS[request.param]()
    gain = 4 if isinstance(made, GPT) else 2 if made.config.prenorm else 1
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1:
            std = 0.3 if "embedding" in name else gain * parameter.shape[1] ** -0.5
            torch.nn.init.normal_(parameter, std=std)
    return made


def inputs(model, ragged, rows=5):
    """Arguments of generate() for a batch, and those for each of its rows alone, unpadded."""
    torch.manual_seed(6)
    lengths = torch.tensor([6, 1, 4, 2, 6][:rows]) if ragged else None
    tokens = torch.randint(3, V, (rows, 6))
    if isinstance(model, GPT):
        batch = {"prompt": tokens, "lengths": lengths}
        names = ("prompt", "lengths")
    else:
        batch = {"source": tokens, "source_lengths": lengths, "start_token": START}
        names = ("source", "source_lengths")
    alone = [
        batch | {names[0]: tokens[i : i + 1, : 6 if lengths is None else lengths[i]]}
        for i in range(rows)
    ]
    return batch, [row | {names[1]: None} for row in alone]


def greedy_by_hand(model, row, count):
    """The likeliest token of the whole model, time after time."""
    tokens = row.get("prompt", torch.tensor([[START]]))
    start = tokens.shape[1]
    for _ in range(count):
        before = (row["source"],) if "source" in row else ()
        logits = model(*before, tokens)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, start:]


@pytest.mark.parametrize("ragged", [False, True])
def test_greedy_is_a_loop_over_the_model(model, ragged):
    batch, rows = inputs(model.eval(), ragged)
    tokens, lengths = generate(model, **batch, max_new_tokens=20, temperature=0)
    assert lengths.tolist() == [20] * 5
    with torch.no_grad():
        expected = torch.stack([greedy_by_hand(model, row, 20) for row in rows])
    assert torch.equal(tokens, expected)
    # It is a test only where tokens vary, within rows and between them.
    assert len(set(expected.flatten().tolist())) > 8
    assert len({tuple(row) for row in expected.tolist()}) == 5


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_cache_changes_nothing(model, ragged, way):
    batch, _ = inputs(model, ragged)
    options = {**batch, "max_new_tokens": 30, "end_token": END, **WAYS[way]}
    tokens, lengths = generate(model, **options)
    without = generate(model, **options, use_cache=False)
    assert torch.equal(tokens, without[0])
    assert torch.equal(lengths, without[1])
    assert len(set(tokens.flatten().tolist())) > 8


@pytest.mark.parametrize("way", ["greedy", "beam search"])
def test_a_row_does_not_depend_on_its_batch(model, way):
    batch, rows = inputs(model, ragged=True)
    options = {"max_new_tokens": 30, "end_token": END, **WAYS[way]}
    tokens, lengths = generate(model, **batch, **options)
    for row, together, length in zip(rows, tokens, lengths, strict=True):
        alone, its_length = generate(model, **row, **options)
        assert its_length[0] == length
        assert torch.equal(alone[0], together[:length])


def test_a_translation_may_be_begun():
    """A prompt for a Transformer is the beginning of its answer; it may be ragged, too."""
    torch.manual_seed(5)
    model = MODELS["seq2seq prenorm"]()
    source = torch.randint(3, V, (3, 6))
    whole, _ = generate(model, source=source, start_token=START, max_new_tokens=9, temperature=0)
    begun = torch.cat([torch.full((3, 1), START), whole[:, :4]], dim=1)
    lengths = torch.tensor([5, 2, 3])
    for use_cache in (True, False):
        rest, _ = generate(
            model, begun, source=source, lengths=lengths, max_new_tokens=5, temperature=0,
            use_cache=use_cache,
        )  # fmt: skip
        for row, tail, length in zip(whole, rest, lengths - 1, strict=True):
            assert torch.equal(row[length : length + 5], tail)


@pytest.mark.parametrize("ragged", [False, True])
def test_rows_end_at_the_end_token(model, ragged):
    """Greedy rows are those without an end, cut after its first: each at its own time."""
    batch, _ = inputs(model, ragged)
    options = {**batch, "max_new_tokens": 20, "temperature": 0}
    endless, _ = generate(model, **options)
    ends = endless.unique().tolist()
    assert len(ends) > 8
    for end in ends:
        tokens, lengths = generate(model, **options, end_token=end)
        for row, whole, length in zip(tokens.tolist(), endless.tolist(), lengths, strict=True):
            cut = whole[: whole.index(end) + 1] if end in whole else whole
            assert length == len(cut)
            assert row == cut + [end] * (tokens.shape[1] - len(cut))
        assert tokens.shape[1] == lengths.max()


def test_ended_rows_stop_costing():
    """Once half of the rows have ended, they are no longer run."""
    torch.manual_seed(5)
    model = MODELS["gpt"]()
    sizes, hidden = [], model.hidden
    model.hidden = lambda *args: sizes.append(tuple(args[0].shape)) or hidden(*args)
    prompt = torch.randint(3, V, (16, 3))
    _, lengths = generate(model, prompt, max_new_tokens=40, end_token=END, seed=0)
    assert len(lengths.unique()) > 5
    assert sizes[0] == (16, 3)
    assert all(count == 1 for _, count in sizes[1:])
    for written, (rows, _) in enumerate(sizes[1:], start=1):
        left = (lengths > written).sum()
        assert left <= rows < 2 * left


def test_seeds():
    model = MODELS["gpt"]()
    prompt = torch.randint(3, V, (4, 3))
    one, again, other = (
        generate(model, prompt, max_new_tokens=12, seed=seed)[0] for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    torch.manual_seed(0)
    one = generate(model, prompt, max_new_tokens=12)[0]
    torch.manual_seed(0)
    assert torch.equal(one, generate(model, prompt, max_new_tokens=12)[0])
    greedy = generate(model, prompt, max_new_tokens=12, temperature=0)[0]
    assert torch.equal(greedy, generate(model, prompt, max_new_tokens=12, top_k=1)[0])


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_beam_search_finds_the_best_of_all(alpha):
    """As many beams as hypotheses; each hypothesis scored by the whole model."""
    torch.manual_seed(1)
    sizes = SIZES | {"vocab_size": 4}
    model = Transformer(TransformerConfig(**sizes)).eval()
    with torch.no_grad():
        model.target_embedding.weight.mul_(6)  # so that the best is not all but a tie
    source = torch.randint(4, (2, 5))
    found, lengths = generate(
        model, source=source, start_token=1, end_token=0, max_new_tokens=3, num_beams=4**3,
        length_penalty=alpha,
    )  # fmt: skip
    for row in range(2):
        scored = []
        for length in (1, 2, 3):
            for tokens in itertools.product(range(4), repeat=length):
                if 0 in tokens[:-1] or (tokens[-1] != 0 and length < 3):
                    continue
                with torch.no_grad():
                    logits = model(source[row : row + 1], torch.tensor([[1, *tokens[:-1]]]))
                log_probs = logits[0].double().log_softmax(-1)
                total = sum(float(log_probs[i, token]) for i, token in enumerate(tokens))
                scored.append((total / ((5 + length) / 6) ** alpha, tokens))
        assert tuple(found[row, : lengths[row]].tolist()) == max(scored)[1]


def test_neither_dropout_nor_gradients_and_the_mode_is_kept():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES, rotary=True)).train()
    model.stack.eval()
    prompt = torch.randint(3, V, (2, 3))
    one = generate(model, prompt, max_new_tokens=20, temperature=0)[0]
    assert torch.equal(one, generate(model, prompt, max_new_tokens=20, temperature=0)[0])
    assert model.training
    assert not model.stack.training
    model.loss(torch.cat([prompt, one], dim=1)).backward()  # what was generated can be trained on


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for():
    model = GPT(GPTConfig(**SIZES)).cuda()
    prompt = torch.randint(3, V, (2, 3), device="cuda")
    generate(model, prompt, max_new_tokens=2)  # what is compiled or loaded on first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        generate(model, prompt, max_new_tokens=20, top_k=5, top_p=0.9, seed=1)
        generate(model, prompt, max_new_tokens=20, end_token=None, temperature=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


PROMPT = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens and num_beams must be at least 1; got 0 and 1"),
        ({"num_beams": 0}, "got 5 and 0"),
        ({"max_new_tokens": 47}, "3 tokens and 47 new ones need 49 positions; the model has 48"),
        ({"temperature": -1}, "temperature must be 0"),
        ({"top_p": math.inf}, "top_p must be above 0 and at most 1; got inf"),
        ({"num_beams": 2, "top_k": 3}, "beam search draws nothing"),
        ({"source": PROMPT}, "a Transformer wants source=, and a GPT wants none"),
        ({"prompt": None}, "without a prompt, source and start_token are needed"),
        ({"prompt": PROMPT[:, :0]}, r"prompt must be \(batch, 1 or more\); got \(2, 0\)"),
        ({"lengths": torch.tensor([0, 3])}, "lengths must be from 1 to 3; got 0 to 3"),
        ({"lengths": torch.tensor([4, 3])}, "lengths must be from 1 to 3; got 3 to 4"),
        ({"lengths": torch.tensor([1])}, r"lengths must be \(2,\); got \(1,\)"),
    ],
)
def test_errors(arguments, message):
    model = MODELS["gpt"]()
    with pytest.raises(ValueError, match=f"generate: .*{message}"):
        generate(model, **{"prompt": PROMPT, "max_new_tokens": 5, **arguments})


def test_errors_of_a_transformer_and_of_other_models():
    model = MODELS["seq2seq"]()
    with pytest.raises(ValueError, match="a Transformer wants source="):
        generate(model, PROMPT, max_new_tokens=5)
    with pytest.raises(ValueError, match="equally many rows; got 2 and 1"):
        generate(model, PROMPT, source=PROMPT[:1], max_new_tokens=5)
    with pytest.raises(TypeError, match="must be a GPT or Transformer; got BERT"):
        generate(BERT(BERTConfig(**SIZES)), PROMPT, max_new_tokens=5)
