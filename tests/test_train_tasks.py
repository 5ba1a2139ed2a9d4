"""Batches of each task: what is read, what is to be told, and what it costs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fusedformer.transformer import train_flops
from fusedformer.transformer.bert import BERT, BERTConfig
from fusedformer.transformer.data import EOS, MASK, PAD, SOS, Images
from fusedformer.transformer.gpt import GPT, GPTConfig
from fusedformer.transformer.seq2seq import Transformer, TransformerConfig
from fusedformer.transformer.train_tasks import (
    Classes,
    MaskedTokens,
    NextToken,
    TextClasses,
    Translation,
    fingerprint,
)
from fusedformer.transformer.vit import ViT, ViTConfig

SIZES = {"d_model": 16, "layers": 2, "heads": 2, "d_ff": 32, "dropout": 0.0}
SEQ2SEQ = TransformerConfig(vocab_size=40, max_length=12, **SIZES)
TEXT = GPTConfig(vocab_size=500, max_length=8, **SIZES)
MASKED = BERTConfig(vocab_size=500, max_length=22, **SIZES)
VIT = ViTConfig(image_size=4, patch_size=2, channels=1, classes=2, **SIZES)


def pairs(count, low=1):
    draw = torch.Generator().manual_seed(count)
    sources, targets = [], []
    for _ in range(count):
        s, t = torch.randint(low, 9, (2,), generator=draw).tolist()
        sources.append([*torch.randint(5, 40, (s,), generator=draw).tolist(), EOS])
        targets.append([SOS, *torch.randint(5, 40, (t,), generator=draw).tolist(), EOS])
    return sources, targets


def translation(batch_size=100, **more):
    return Translation(SEQ2SEQ, pairs(60), pairs(20), batch_size, seed=0, **more)


def next_token(**more):
    # Token i is i: a piece shows where it was cut out.
    return NextToken(TEXT, [range(5, 305)], [range(305, 400)], 32, seed=0, **more)


def masked(**more):
    return MaskedTokens(MASKED, [range(5, 305)], [range(305, 400)], 64, seed=0, **more)


def classes(**more):
    pixels = torch.arange(20 * 16, dtype=torch.float).reshape(20, 1, 4, 4).fmod(256).byte()
    images = Images(pixels, torch.arange(20) % 2, ["even", "odd"])
    index = torch.arange(20)
    return Classes(VIT, images.take(index[:16]), images.take(index[16:]), 6, seed=0, **more)


def text_classes(**more):
    both = [(texts, [len(text) % 2 for text in texts]) for texts in (pairs(60)[1], pairs(20)[1])]
    return TextClasses(MASKED, *both, 100, seed=0, **more)


TASKS = [translation, next_token, masked, classes, text_classes]


# --- What every task promises ---------------------------------------------------------------------


@pytest.mark.parametrize("make", TASKS)
def test_a_batch_is_a_function_of_its_number(make):
    first, again = make(), make()
    numbers = range(2 * len(first.batches) + 1)
    forward = [first.batch(number) for number in numbers]
    for number in reversed(numbers):
        batch = again.batch(number)
        assert batch.inputs.keys() == forward[number].inputs.keys()
        for name, tensor in batch.inputs.items():
            assert torch.equal(tensor, forward[number].inputs[name])
        assert batch.terms == first.terms(number) == forward[number].terms


@pytest.mark.parametrize("make", TASKS)
def test_terms_are_those_of_the_models_mean(make):
    """The mean over a batch times its terms is a sum: that of its rows."""
    models = {translation: Transformer(SEQ2SEQ), next_token: GPT(TEXT), classes: ViT(VIT)}
    model = models.get(make) or BERT(MASKED)
    task = make()
    loss = getattr(model.double(), task.loss)
    for batch in [task.batch(0), *task.held_out_batches()]:
        rows = len(next(iter(batch.inputs.values())))
        whole = loss(**doubled(batch.inputs)) * batch.terms
        parts = 0.0
        for row in range(rows):
            inputs = {name: tensor[row : row + 1] for name, tensor in batch.inputs.items()}
            if make is translation:
                terms = int(inputs["target_lengths"]) - 1
            elif make is masked:
                terms = int((inputs["labels"] >= 0).sum())
            else:
                terms = inputs["tokens"].shape[1] - 1 if make is next_token else 1
            parts += loss(**doubled(inputs)) * terms
        torch.testing.assert_close(whole, parts)


def doubled(inputs):
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def test_fingerprint_is_of_the_training_data():
    assert fingerprint(next_token()) == fingerprint(next_token())
    other = NextToken(TEXT, [range(6, 306)], [range(305, 400)], 32, seed=0)
    assert fingerprint(other) != fingerprint(next_token())
    marks = {fingerprint(make()) for make in TASKS}
    # The text of both text tasks is the same.
    assert len(marks) == 4


# --- Each task ------------------------------------------------------------------------------------


def test_translation():
    task = translation()
    seen = []
    for number in range(len(task.batches)):
        inputs = task.batch(number).inputs
        assert inputs["source"].numel() + inputs["target"].numel() <= 100
        for row in range(len(inputs["source"])):
            source = inputs["source"][row, : inputs["source_lengths"][row]].tolist()
            target = inputs["target"][row, : inputs["target_lengths"][row]].tolist()
            seen.append((source, target))
            assert (inputs["source"][row, len(source) :] == PAD).all()
    assert sorted(seen) == sorted(zip(*pairs(60), strict=True))
    held_out = sum(len(batch.inputs["source"]) for batch in task.held_out_batches())
    assert held_out == 20


def test_pair_that_is_too_long():
    sources, targets = pairs(3)
    # 12 positions hold <sos> and 11 more of a target, whose <eos> is only predicted.
    targets[1] = [SOS, *[7] * 11, EOS]
    Translation(SEQ2SEQ, (sources, targets), pairs(2), 100, seed=0)
    targets[1] = [SOS, *[7] * 12, EOS]
    with pytest.raises(ValueError, match="training pair 2 has 13 tokens, more than max_length, 12"):
        Translation(SEQ2SEQ, (sources, targets), pairs(2), 100, seed=0)


def test_next_token():
    task = next_token()
    starts = []
    for number in range(2 * len(task.batches)):
        tokens = task.batch(number).inputs["tokens"]
        assert tokens.shape[1] == 9
        assert tokens[:, :-1].numel() <= 32
        assert (tokens.diff(dim=1) == 1).all()
        starts.append(tokens[:, 0])
    epochs = torch.cat(starts).reshape(2, -1).sort().values
    # Each epoch has the text once, cut at other places.
    assert (epochs.diff(dim=1) == 8).all()
    assert epochs[0, 0] != epochs[1, 0]
    assert epochs.amin() >= 5
    assert epochs.amax() + 8 < 305
    predicted = torch.cat([b.inputs["tokens"][:, 1:].flatten() for b in task.held_out_batches()])
    assert predicted.tolist() == list(range(306, 400))


def test_masked_tokens():
    task = masked()
    count = kept = hidden = 0
    for number in range(40 * len(task.batches)):
        inputs = task.batch(number).inputs
        tokens, labels = inputs["tokens"], inputs["labels"]
        assert tokens.numel() <= 64
        assert (tokens[:, 0] == SOS).all()
        assert (tokens[:, -1] == EOS).all()
        asked = labels >= 0
        # 15% of the 20 tokens of a piece, each the one that stood there.
        assert (asked.sum(1) == 3).all()
        assert not asked[:, [0, -1]].any()
        true = tokens.where(~asked, labels)[:, 1:-1]
        assert (true.diff(dim=1) == 1).all()
        count += int(asked.sum())
        hidden += int((tokens[asked] == MASK).sum())
        kept += int((tokens[asked] == labels[asked]).sum())
        assert (tokens[asked] >= MASK).all()
    # Binomial: five standard deviations.
    for share, found in ((0.8, hidden), (0.1, kept)):
        assert abs(found - share * count) < 5 * (count * share * (1 - share)) ** 0.5
    first, again = (
        [batch.inputs["tokens"] for batch in task.held_out_batches()] for _ in range(2)
    )
    assert all(map(torch.equal, first, again))
    assert sum(len(tokens) for tokens in first) == 95 // 20


def test_text_that_is_too_short():
    with pytest.raises(ValueError, match="the text has 2 tokens, too few"):
        NextToken(TEXT, [[1, 2]], [[1, 2]], 8, seed=0)


def test_classes():
    task = classes()
    batch = task.batch(0)
    assert batch.inputs["images"].shape == (6, 1, 4, 4)
    everything = torch.cat([task.batch(i).inputs["images"] for i in range(len(task.batches))])
    assert everything.double().mean().abs() < 1e-6
    assert everything.double().std() == pytest.approx(1, abs=1e-5)
    held_out = torch.cat([batch.inputs["labels"] for batch in task.held_out_batches()])
    assert held_out.tolist() == [0, 1, 0, 1]


def test_images_are_moved():
    still, moved = classes().batch(0).inputs, classes(shift=1).batch(0).inputs
    assert torch.equal(still["labels"], moved["labels"])
    places = set()
    for before, after in zip(still["images"][:, 0], moved["images"][:, 0], strict=True):
        wide = torch.nn.functional.pad(before[None, None], (1,) * 4, mode="replicate")[0, 0]
        cuts = wide.unfold(0, 4, 1).unfold(1, 4, 1).flatten(0, 1)  # (9, 4, 4)
        (place,) = {i for i, cut in enumerate(cuts) if torch.equal(cut, after)}
        places.add(place)
    assert len(places) > 2
    (held_out, *_), (same, *_) = (classes(shift=s).held_out_batches() for s in (0, 1))
    assert torch.equal(held_out.inputs["images"], same.inputs["images"])


def test_text_classes():
    task = text_classes()
    seen = []
    for batch in map(task.batch, range(len(task.batches))):
        inputs = batch.inputs
        assert inputs["tokens"].numel() <= 100
        assert batch.tokens == inputs["lengths"].sum()
        assert torch.equal(inputs["labels"], inputs["lengths"] % 2)
        for row, length in zip(inputs["tokens"], inputs["lengths"], strict=True):
            seen.append(row[:length].tolist())
            assert (row[length:] == PAD).all()
    assert sorted(seen) == sorted(pairs(60)[1])
    assert sum(batch.terms for batch in task.held_out_batches()) == 20
    texts = [[SOS, *[7] * 20, EOS], [SOS, *[7] * 21, EOS]]
    with pytest.raises(ValueError, match="training text 2 has 23 tokens, more than max_length, 22"):
        TextClasses(MASKED, (texts, [0, 1]), (texts, [0, 1]), 100, seed=0)


# --- Operations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", TASKS)
def test_operations_are_those_that_torch_counts(make):
    """In the forward of rows without padding.

    The counter is told what attention does, the whole square; of causal attention the formulas
    count a half.
    """

    def attention(query, key, *args, **kwargs):
        batch, heads, queries, dim = query
        return 4 * batch * heads * queries * key[2] * dim

    known = {torch.ops.fusedformer.attention_fwd: attention}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        if make is translation:
            model, lengths = Transformer(SEQ2SEQ), [(7, 5)] * 3
            model(torch.full((3, 7), 5), torch.full((3, 5), 5))
            ours = train_flops.seq2seq(SEQ2SEQ, lengths)
            causal = 2 * 3 * 5 * 5 * 16 * 2
        elif make is next_token:
            GPT(TEXT)(torch.full((3, 8), 5))
            ours, causal = train_flops.gpt(TEXT, 3, 8), 2 * 3 * 8 * 8 * 16 * 2
        elif make is masked:
            model = BERT(MASKED)
            hidden = model(torch.full((3, 8), 5))
            model.masked_lm(hidden[:, :2])
            ours, causal = train_flops.bert(MASKED, 3, 8, 6), 0
        elif make is text_classes:
            model = BERT(MASKED)
            model.classify(model(torch.full((3, 8), 5)))
            ours, causal = train_flops.bert_classifier(MASKED, [8] * 3), 0
        else:
            ViT(VIT)(torch.zeros(3, 1, 4, 4))
            ours, causal = train_flops.vit(VIT, 3), 0
    assert ours / 3 + causal == counter.get_total_flops()
