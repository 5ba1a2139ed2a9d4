"""The encoder-decoder: its positions, what each position sees, its loss, errors; it learns."""

import math

import pytest
import torch
from bounds import assert_within_bound
from model_cases import LENGTHS, REAL, TOKENS, VOCAB, randomize, seq2seq
from torch.nn import functional

from fusedformer import TransformerConfig
from fusedformer.transformer.layers import sinusoidal_positions

SOURCE, TARGET = TOKENS, TOKENS.flip(1)
SOURCE_LENGTHS, TARGET_LENGTHS = LENGTHS, LENGTHS.flip(0)
TARGET_REAL = torch.arange(13) < TARGET_LENGTHS[:, None]


def model(**changes):
    return randomize(seq2seq(**changes)).eval()


def test_sinusoidal_positions():
    """Section 3.5, number by number."""
    found = sinusoidal_positions(torch.arange(50), 6)
    assert found.dtype == torch.float32
    for pos in (0, 1, 7, 49):
        for i in range(3):
            angle = pos / 10000 ** (2 * i / 6)
            for number, expected in ((2 * i, math.sin(angle)), (2 * i + 1, math.cos(angle))):
                # The angle is float32: it has 24 bits.
                assert abs(found[pos, number] - expected) <= max(angle, 1) * 2**-23
    rows = torch.tensor([[3, 4], [0, 9]])
    assert torch.equal(sinusoidal_positions(rows, 6), found[rows])


def test_embeddings_are_scaled():
    """Embeddings times sqrt(d_model), plus positions (section 3.4)."""
    net = model()
    found = net.embed(net.target_embedding, TOKENS, torch.arange(13))
    expected = net.target_embedding(TOKENS) * 32**0.5 + sinusoidal_positions(torch.arange(13), 32)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("place", [0, 6, 12])
def test_a_target_token_changes_nothing_before_it(place, prenorm):
    net = model(prenorm=prenorm)
    other = TARGET.clone()
    other[:, place] = (other[:, place] + 1) % VOCAB
    before, after = net(SOURCE, TARGET), net(SOURCE, other)
    assert torch.equal(before[:, :place], after[:, :place])
    assert (before[:, place:] != after[:, place:]).any(-1).all()


def test_every_source_token_counts():
    """The encoder has no mask: the last token reaches the first position of memory."""
    net = model()
    other = SOURCE.clone()
    other[:, -1] = (other[:, -1] + 1) % VOCAB
    assert (net.encode(SOURCE) != net.encode(other)).any(-1).all()


@pytest.mark.parametrize("prenorm", [False, True])
def test_padding_changes_nothing(prenorm):
    """Neither what it holds, bit for bit, nor how much of it there is, up to rounding."""
    net = model(prenorm=prenorm)
    logits = net(SOURCE, TARGET, SOURCE_LENGTHS, TARGET_LENGTHS)
    others = SOURCE.masked_fill(~REAL, 7), TARGET.masked_fill(~TARGET_REAL, 7)
    again = net(*others, SOURCE_LENGTHS, TARGET_LENGTHS)
    assert torch.equal(logits[TARGET_REAL], again[TARGET_REAL])
    for row in range(3):
        source = SOURCE[row : row + 1, : SOURCE_LENGTHS[row]]
        target = TARGET[row : row + 1, : TARGET_LENGTHS[row]]
        truth, eager = net.double()(source, target)[0], net.float()(source, target)[0]
        assert_within_bound("logits", logits[row, : TARGET_LENGTHS[row]], eager, truth)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("padded", [False, True])
def test_loss(padded, smoothing):
    net = model()
    lengths = (SOURCE_LENGTHS, TARGET_LENGTHS) if padded else (None, None)
    labels = TARGET[:, 1:].clone()
    if padded:
        labels[~TARGET_REAL[:, 1:]] = -100

    def plain(logits):
        return functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), labels, label_smoothing=smoothing
        )

    eager = plain(net(SOURCE, TARGET, *lengths))
    truth = plain(net.double()(SOURCE, TARGET, *lengths))
    found = net.float().loss(SOURCE, TARGET, *lengths, label_smoothing=smoothing)
    assert_within_bound("loss", found, eager, truth)


def test_unshared_embeddings():
    """Three matrices; equal ones make it the shared model."""
    shared = model()
    apart = model(share_embeddings=False, source_vocab_size=VOCAB)
    weight = shared.target_embedding.weight
    state = shared.state_dict() | {"source_embedding.weight": weight, "output.weight": weight}
    apart.load_state_dict(state)
    assert torch.equal(apart(SOURCE, TARGET), shared(SOURCE, TARGET))
    wide = model(share_embeddings=False, source_vocab_size=100)
    assert wide(SOURCE + 60, TARGET).shape == (3, 13, VOCAB)


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (SOURCE + 1, TARGET, "Transformer: source must hold ids from 0 to 30; got 31"),
        (SOURCE, TARGET - 1, "Transformer: target must hold ids from 0 to 30; got -1"),
        (SOURCE, TARGET.repeat(1, 80), "Transformer: target must end within max_length, 1024"),
        (SOURCE[0], TARGET, r"Transformer: source must be \(batch, length\); got \(13,\)"),
    ],
)
def test_errors(source, target, message):
    with pytest.raises(ValueError, match=message):
        seq2seq()(source, target)


def test_errors_of_the_configuration():
    with pytest.raises(ValueError, match=r"source_vocab_size must be vocab_size where .* shared"):
        TransformerConfig(vocab_size=10, source_vocab_size=11)
    with pytest.raises(ValueError, match="d_model must be even for sinusoidal positions; got 9"):
        TransformerConfig(d_model=9, heads=3)


# --- It learns ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("task", "prenorm"), [("copy", True), ("reverse", False)])
def test_learns(task, prenorm):
    """Rows of unequal lengths; held-out rows come out right, every one, one token at a time."""
    torch.manual_seed(0)
    start, end, letters = 8, 9, 8
    net = seq2seq(
        vocab_size=10, d_model=64, heads=4, layers=1, d_ff=128, dropout=0.0, prenorm=prenorm
    )

    def batch(rows: int):
        source = torch.randint(letters, (rows, 6))
        lengths = torch.randint(2, 7, (rows,))
        answer = source.clone()
        if task == "reverse":
            place = (lengths[:, None] - 1 - torch.arange(6)).clamp(min=0)
            answer = source.gather(1, place)
        target = torch.cat((torch.full((rows, 1), start), answer, torch.zeros(rows, 1).long()), 1)
        target.scatter_(1, lengths[:, None] + 1, end)
        return source, target, lengths, lengths + 2

    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    steps = 400 if task == "copy" else 700
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        net.loss(*batch(64), label_smoothing=0.1).backward()
        optimizer.step()
        schedule.step()
    net.eval()
    source, target, lengths, target_lengths = batch(300)
    with torch.no_grad():
        memory, cache = net.encode(source, lengths), net.new_cache(300, 8)
        tokens = target[:, :1]
        for _ in range(7):
            logits = net.decode(tokens[:, -1:], memory, lengths, cache=cache)
            tokens = torch.cat((tokens, logits[:, -1].argmax(-1, keepdim=True)), 1)
    real = torch.arange(8) < target_lengths[:, None]
    assert torch.equal(tokens[real], target[real])
