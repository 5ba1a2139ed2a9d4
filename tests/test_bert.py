"""BERT: what a position sees, its two losses, errors."""

import pytest
import torch
from bounds import assert_within_bound
from model_cases import CLASSES, LENGTHS, REAL, TOKENS, VOCAB, bert, randomize
from torch.nn import functional


def model(**changes):
    return randomize(bert(**changes)).eval()


def test_every_position_sees_every_other():
    net = model()
    for place in (0, 6, 12):
        other = TOKENS.clone()
        other[:, place] = (other[:, place] + 1) % VOCAB
        assert (net(TOKENS) != net(other)).any(-1).all()


def test_segments():
    """All 0 by default; another segment is another text."""
    net = model()
    assert torch.equal(net(TOKENS), net(TOKENS, torch.zeros_like(TOKENS)))
    assert (net(TOKENS) != net(TOKENS, torch.arange(13).ge(6).long().expand(3, 13))).any(-1).all()


def test_padding_changes_nothing():
    """Neither what it holds, bit for bit, nor how much of it there is, up to rounding."""
    net = model()
    hidden = net(TOKENS, None, LENGTHS)
    assert torch.equal(hidden[REAL], net(TOKENS.masked_fill(~REAL, 7), None, LENGTHS)[REAL])
    for row, length in enumerate(LENGTHS.tolist()):
        alone = TOKENS[row : row + 1, :length]
        truth, eager = net.double()(alone)[0], net.float()(alone)[0]
        assert_within_bound("hidden", hidden[row, :length], eager, truth)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_lm_loss(smoothing):
    net = model()
    labels = torch.where(REAL & (TOKENS % 3 == 0), TOKENS, -100)

    def plain():
        logits = net.masked_lm(net(TOKENS, None, LENGTHS)).flatten(0, 1)
        return functional.cross_entropy(logits, labels.flatten(), label_smoothing=smoothing)

    eager = plain()
    net.double()
    truth = plain()
    found = net.float().loss(TOKENS, labels, lengths=LENGTHS, label_smoothing=smoothing)
    assert_within_bound("loss", found, eager, truth)


def test_classification_loss():
    net = model(classes=3)

    def plain():
        return functional.cross_entropy(net.classify(net(TOKENS, None, LENGTHS)), CLASSES)

    eager = plain()
    net.double()
    truth = plain()
    found = net.float().classification_loss(TOKENS, CLASSES, lengths=LENGTHS)
    assert_within_bound("loss", found, eager, truth)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (torch.full_like(TOKENS, 2), "BERT: segments must hold ids from 0 to 1; got 2"),
        (TOKENS[0], r"BERT: segments must be \(batch, length\); got \(13,\)"),
        (TOKENS[:, :5] * 0, r"BERT: segments must be \(3, 13\), as tokens; got \(3, 5\)"),
    ],
)
def test_errors(segments, message):
    with pytest.raises(ValueError, match=message):
        bert()(TOKENS, segments)
    with pytest.raises(ValueError, match="BERT: tokens must hold ids from 0 to 30; got 31"):
        bert()(TOKENS + 1)
