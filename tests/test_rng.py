"""The random-number contract: known values, exact probability, independence, positions."""

import functools
import math

import numpy as np
import pytest
import torch

from fusedformer.kernels import rng

PROBABILITIES = (1e-3, 0.01, 0.1, 0.5)
# |z| beyond this has a chance of 6e-7 a test; the seeds are fixed, so a failure is a defect.
Z = 5.0


def _philox_numpy(key: int, counter: tuple[int, ...], rounds: int) -> list[int]:
    """Philox4x32 in Python's unbounded integers, from the paper's definition."""
    c = list(counter)
    k = [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF]
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_known_answer():
    # Random123's kat_vectors: philox4x32 with 7 rounds.
    for counter, key, words in [
        ((0, 0, 0, 0), 0, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    ]:
        assert _philox_numpy(key, counter, 7) == words
        signed = key - 2**64 if key >= 2**63 else key
        got = rng.philox(torch.tensor(signed), tuple(torch.tensor(c) for c in counter))
        assert [int(word) for word in got] == words


def test_philox_matches_python_integers():
    generator = np.random.default_rng(0)
    counters = generator.integers(0, 2**32, (50, 4))
    for seed in (-1, 2**63 - 1, -(2**63), 12345):
        got = rng.philox(torch.tensor(seed), tuple(torch.tensor(c) for c in counters.T))
        for row, counter in enumerate(counters.tolist()):
            assert [int(word[row]) for word in got] == _philox_numpy(seed % 2**64, counter, 7)


def test_attention_mapping_is_the_documented_one():
    seed, p, shape, offsets = 99, 0.37, (2, 3, 40, 50), (5, 1, 32, 16)
    keep = rng.attention_keep(torch.tensor(seed), p, shape, offsets)
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 39, 49), (0, 1, 8, 7), (1, 0, 17, 9), (0, 2, 31, 32)]:
        gb, gh, gi, gj = b + offsets[0], h + offsets[1], i + offsets[2], j + offsets[3]
        counter = (
            gi // 16 * 4 + gi % 8 // 2,
            gj // 16 * 4 + gj % 8 // 2,
            rng.ATTENTION << 16 | gh,
            gb,
        )
        word = _philox_numpy(seed, counter, 7)[2 * (gi % 2) + gj % 2]
        bits = 8 * (2 * (gi // 8 % 2) + gj // 8 % 2)
        rotated = (word << bits | word >> (32 - bits)) & 0xFFFFFFFF
        assert bool(keep[b, h, i, j]) == (rotated >= rng.threshold(p))


def test_rows_mapping_is_the_documented_one():
    seed, p = 7, 0.37
    keep = rng.rows_keep(torch.tensor(seed), p, 5, 70, rng.DROPOUT)
    for row, column in [(0, 0), (4, 69), (2, 17), (3, 31), (1, 36)]:
        e = column % 16
        word = _philox_numpy(seed, (column // 16, row, rng.DROPOUT << 16, 0), 7)[e % 4]
        bits = 8 * (e // 4)
        rotated = (word << bits | word >> (32 - bits)) & 0xFFFFFFFF
        assert bool(keep[row, column]) == (rotated >= rng.threshold(p))


def test_attention_mask_is_a_function_of_the_position():
    seed = torch.tensor(3)
    whole = rng.attention_keep(seed, 0.3, (3, 4, 96, 160))
    part = rng.attention_keep(seed, 0.3, (2, 2, 50, 70), (1, 2, 32, 80))
    assert torch.equal(part, whole[1:, 2:, 32:82, 80:150])


def test_threshold_is_exact_to_32_bits():
    assert rng.threshold(0.0) == 0
    assert rng.threshold(1.0) == 2**32 - 1
    for p in (1e-9, 1e-3, 0.1, 1 / 3, 0.999):
        assert abs(rng.threshold(p) / 2**32 - p) <= 2**-33


@functools.cache
def _masks(p: float) -> list[torch.Tensor]:
    seed = torch.tensor(2024)
    return [
        ~rng.attention_keep(seed, p, (2, 2, 1000, 1000)),
        ~rng.rows_keep(seed, p, 2000, 2000, rng.DROPOUT),
    ]


@pytest.mark.parametrize("p", PROBABILITIES)
def test_marginal_probability_is_p(p):
    for dropped in _masks(p):
        n = dropped.numel()
        z = (int(dropped.sum()) - n * p) / math.sqrt(n * p * (1 - p))
        # Elements that share a word are not quite independent, which the slack of Z covers; FA2's
        # rounding of p to 1/256 would give |z| of 70 and more here, at each of these p but 0.5.
        assert abs(z) < Z


@pytest.mark.parametrize("p", PROBABILITIES)
def test_every_position_of_a_tile_drops_with_probability_p(p):
    dropped = _masks(p)[0][:, :, :992, :992].reshape(4, 62, 16, 62, 16).permute(2, 4, 0, 1, 3)
    n = dropped[0, 0].numel()
    z = (dropped.flatten(2).sum(2) - n * p) / math.sqrt(n * p * (1 - p))
    assert z.abs().max() < Z
    assert z.std() < 1.5  # over 256 positions


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_nearly_independent(p):
    """Correlation at small lags, and between the elements that share a word."""
    mask = _masks(p)[0][0, 0].double()
    centred = mask - p
    for di, dj in [(0, 1), (1, 0), (1, 1), (0, 2), (0, 16), (16, 0)]:
        a, b = centred[di:, dj:], centred[: 1000 - di, : 1000 - dj]
        z = float((a * b).sum()) / (p * (1 - p) * math.sqrt(a.numel()))
        assert abs(z) < Z, (di, dj)
    # A word's four elements agree a little more often, by ties of the top byte: under 1/256.
    for di, dj in [(0, 8), (8, 0), (8, 8)]:
        tile = centred[:992, :992].reshape(62, 2, 8, 62, 2, 8)
        a, b = tile[:, 0, :, :, 0], tile[:, di // 8, :, :, dj // 8]
        correlation = float((a * b).mean()) / (p * (1 - p))
        assert abs(correlation) < 1 / 256 / (p * (1 - p)) + Z / math.sqrt(a.numel())


def test_seeds_batches_heads_and_ops_are_independent():
    p, shape = 0.3, (2, 2, 400, 400)
    one = rng.attention_keep(torch.tensor(1), p, shape).double()
    two = rng.attention_keep(torch.tensor(2), p, shape).double()
    pairs = [(one[0, 0], two[0, 0]), (one[0, 0], one[0, 1]), (one[0, 0], one[1, 0])]
    rows = [rng.rows_keep(torch.tensor(1), p, 400, 400, tag).double() for tag in (2, 3, 4)]
    pairs += [(rows[0], rows[1]), (rows[0], rows[2]), (rows[1], rows[2])]
    for a, b in pairs:
        z = float(((a - 1 + p) * (b - 1 + p)).sum()) / (p * (1 - p) * math.sqrt(a.numel()))
        assert abs(z) < Z


def test_scaled_by_the_rounded_threshold_the_mean_is_unbiased():
    # The scale is 1 / (1 - p); with the probability kept exactly 1 - p the mean is 1.
    for p in (1e-3, 0.1, 0.5):
        assert abs((1 - rng.threshold(p) / 2**32) / (1 - p) - 1) < 2**-31


def test_a_drawn_seed_follows_torch_manual_seed():
    torch.manual_seed(5)
    first, second = (rng.draw_seed(torch.device("cpu")) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, rng.draw_seed(torch.device("cpu")))
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64
    assert first.dim() == 0
