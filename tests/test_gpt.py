"""GPT: what a position sees, its loss, rotary positions, errors."""

import pytest
import torch
from bounds import assert_within_bound
from model_cases import LENGTHS, REAL, TOKENS, VOCAB, gpt, randomize
from torch.nn import functional

from fusedformer.transformer.layers import Rotary


def model(**changes):
    return randomize(gpt(**changes)).eval()


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("place", [0, 6, 12])
def test_a_token_changes_nothing_before_it(rotary, place):
    """Bit for bit; and something from itself on."""
    net = model(rotary=rotary)
    other = TOKENS.clone()
    other[:, place] = (other[:, place] + 1) % VOCAB
    before, after = net(TOKENS), net(other)
    assert torch.equal(before[:, :place], after[:, :place])
    assert (before[:, place:] != after[:, place:]).any(-1).all()


@pytest.mark.parametrize("rotary", [False, True])
def test_padding_changes_nothing(rotary):
    """Neither what it holds, bit for bit, nor how much of it there is, up to rounding."""
    net = model(rotary=rotary)
    logits = net(TOKENS, LENGTHS)
    assert torch.equal(logits[REAL], net(TOKENS.masked_fill(~REAL, 7), LENGTHS)[REAL])
    for row, length in enumerate(LENGTHS.tolist()):
        alone = TOKENS[row : row + 1, :length]
        truth = net.double()(alone)[0]
        eager = net.float()(alone)[0]
        assert_within_bound("logits", logits[row, :length], eager, truth)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_loss(lengths, smoothing):
    """The mean over the tokens that are predicted, of cross-entropy on the logits."""
    net = model()
    labels = TOKENS[:, 1:].clone()
    if lengths is not None:
        labels[~REAL[:, 1:]] = -100

    def plain(logits):
        # Each position given those before it alone, all of them real.
        return functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), labels, label_smoothing=smoothing
        )

    eager = plain(net(TOKENS, lengths))
    truth = plain(net.double()(TOKENS, lengths))
    found = net.float().loss(TOKENS, lengths, label_smoothing=smoothing)
    assert_within_bound("loss", found, eager, truth)


def test_loss_reads_no_padding():
    """A padded token is neither read nor predicted, so it may be anything that is a token."""
    net = model()
    other = TOKENS.masked_fill(~REAL, 0)
    assert torch.equal(net.loss(TOKENS, LENGTHS), net.loss(other, LENGTHS))


def test_logits_in_parts():
    net = model()
    hidden = net.hidden(TOKENS)
    assert torch.equal(net.logits(hidden), net(TOKENS))
    rows = net.cross_entropy(hidden, TOKENS, reduction="none")
    assert rows.shape == TOKENS.shape
    torch.testing.assert_close(rows.mean(), net.cross_entropy(hidden, TOKENS))


# --- Rotary positions -----------------------------------------------------------------------------


def test_rotary_is_a_rotation_by_complex_numbers():
    """The pair (i, i + D/2) as one complex number, times exp(i pos / 10000^(2i/D))."""
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [9, 2, 0, 5, 100, 6, 7]])
    angles = positions[..., None] / 10000.0 ** (torch.arange(4, dtype=torch.float64) / 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(()).double(), angles)[
        :, None
    ]
    found, again = Rotary(positions, 8)(x, x)
    assert torch.equal(found, again)
    expected = torch.cat((turned.real, turned.imag), -1)
    # Angles are float32: 100 of them is the largest.
    assert (found - expected).abs().max() <= 100 * 2**-23 * x.abs().max()


def test_rotary_scores_depend_on_distances():
    q, k = torch.randn(2, 1, 1, 1, 8).double()
    scores = [
        (Rotary(torch.tensor([a]), 8)(q, q)[0] * Rotary(torch.tensor([b]), 8)(k, k)[1]).sum()
        for a, b in ((0, 3), (5, 8), (40, 43))
    ]
    other = (Rotary(torch.tensor([0]), 8)(q, q)[0] * Rotary(torch.tensor([4]), 8)(k, k)[1]).sum()
    spread = max(scores) - min(scores)
    assert spread <= 2 * 43 * 2**-23 * q.norm() * k.norm() < (other - scores[0]).abs()


def test_rotary_model_knows_order():
    """It has no table of positions, and yet reversed tokens are another text."""
    net = model(rotary=True)
    assert net.position_embedding is None
    last, other = net(TOKENS[:, :5])[:, -1], net(TOKENS[:, [1, 0, 2, 3, 4]])[:, -1]
    assert not torch.allclose(last, other, atol=1e-3)


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (TOKENS + 1, ValueError, "GPT: tokens must hold ids from 0 to 30; got 31"),
        (TOKENS - 1, ValueError, "GPT: tokens must hold ids from 0 to 30; got -1"),
        (TOKENS.float(), TypeError, "GPT: tokens must be an int64 or int32 .* got torch.float32"),
        ([[1, 2]], TypeError, "GPT: tokens must be an int64 or int32 tensor .* got list"),
        (TOKENS[0], ValueError, r"GPT: tokens must be \(batch, length\); got \(13,\)"),
        (
            TOKENS.repeat(1, 2), ValueError,
            "GPT: tokens must end within max_length, 16 positions; got 26 tokens from position 0",
        ),
    ],
)  # fmt: skip
def test_errors(tokens, error, message):
    with pytest.raises(error, match=message):
        gpt()(tokens)


def test_errors_of_the_configuration():
    with pytest.raises(ValueError, match="must be even for rotary positions; got 36 / 4"):
        gpt(d_model=36, rotary=True)


def test_errors_of_loss():
    with pytest.raises(ValueError, match=r"GPT.loss: tokens must be .* 2 or more; got \(3, 1\)"):
        gpt().loss(TOKENS[:, :1])


# --- It learns ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rotary", [False, True])
def test_learns_to_copy(rotary):
    """Random letters, a bar, and the same letters: each of the second half in every row right."""
    torch.manual_seed(0)
    net = gpt(rotary=rotary, dropout=0.0, vocab_size=9, d_model=64, d_ff=128)

    def batch(rows: int) -> torch.Tensor:
        letters = torch.randint(8, (rows, 6))
        return torch.cat((letters, torch.full((rows, 1), 8), letters), 1)

    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 400)
    for _ in range(400):
        optimizer.zero_grad()
        net.loss(batch(64)).backward()
        optimizer.step()
        schedule.step()
    held_out = batch(500)
    guesses = net.eval()(held_out[:, :-1]).argmax(-1)
    assert torch.equal(guesses[:, 6:], held_out[:, 7:])
