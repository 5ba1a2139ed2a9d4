"""Beam search against exhaustive search over every hypothesis of a tiny vocabulary."""

import itertools
import math

import pytest
import torch

from fusedformer.transformer.beam import beam_search, length_penalty

V, LIMIT, END = 3, 4, 2


class Table:
    """A language model that is a random table: a next-token distribution for every history."""

    def __init__(self, batch, seed, sharpness=1.0):
        generator = torch.Generator().manual_seed(seed)
        self.tables = [
            {
                history: (sharpness * torch.randn(V, generator=generator)).log_softmax(-1)
                for length in range(LIMIT)
                for history in itertools.product(range(V), repeat=length)
            }
            for _ in range(batch)
        ]
        self.steps = 0
        self.rows = None  # the histories of the call before, to check the parents

    def first(self):
        return torch.stack([table[()] for table in self.tables])

    def step(self, tokens, parents):
        histories = [tuple(row) for row in tokens.tolist()]
        if self.rows is not None:
            assert [self.rows[parent] for parent in parents] == [row[:-1] for row in histories]
        self.rows = histories
        self.steps += 1
        beams = len(histories) // len(self.tables)
        assert torch.equal(parents // beams, torch.arange(len(histories)) // beams)
        return torch.stack(
            [self.tables[row // beams][history] for row, history in enumerate(histories)]
        )

    def best(self, row, alpha, end):
        """Every hypothesis that ends, or is as long as may be; the best, and its score."""
        scored = []
        for length in range(1, LIMIT + 1):
            for hypothesis in itertools.product(range(V), repeat=length):
                ended = end is not None and hypothesis[-1] == end
                if (end is not None and end in hypothesis[:-1]) or not (ended or length == LIMIT):
                    continue
                log_p = sum(
                    float(self.tables[row][hypothesis[:i]][token])
                    for i, token in enumerate(hypothesis)
                )
                scored.append((log_p / ((5 + length) / 6) ** alpha, hypothesis))
        return max(scored)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 3.0, -1.0])
@pytest.mark.parametrize("end", [END, None])
@pytest.mark.parametrize("check_every", [1, 3])
def test_as_many_beams_as_hypotheses_are_exhaustive_search(alpha, end, check_every):
    for seed in range(10):
        table = Table(batch=3, seed=seed, sharpness=1 + seed / 2)
        tokens, lengths, scores = beam_search(
            table.step, table.first(), V**LIMIT, LIMIT, end, alpha, check_every
        )
        for row in range(3):
            score, hypothesis = table.best(row, alpha, end)
            assert tuple(tokens[row, : lengths[row]].tolist()) == hypothesis
            assert math.isclose(scores[row], score, rel_tol=1e-5)
            assert (tokens[row, lengths[row] :] == END).all()


def test_more_beams_find_the_best_more_often_and_never_better():
    found = {1: 0, 2: 0, 3: 0}
    for seed in range(40):
        table = Table(batch=1, seed=seed)
        best, _ = table.best(0, 0.6, END)
        for beams in found:
            table.rows = None
            *_, score = beam_search(table.step, table.first(), beams, LIMIT, END, 0.6)
            assert score <= best + 1e-6
            found[beams] += math.isclose(score, best, rel_tol=1e-5)
    assert found[1] < found[2] <= found[3]


def test_a_row_does_not_depend_on_the_others():
    table = Table(batch=4, seed=5)
    together, lengths, scores = beam_search(table.step, table.first(), 2, LIMIT, END)
    for row in range(4):
        alone = Table(batch=4, seed=5)
        alone.tables = alone.tables[row : row + 1]
        tokens, length, score = beam_search(alone.step, alone.first(), 2, LIMIT, END)
        assert torch.equal(tokens[0, : length[0]], together[row, : lengths[row]])
        assert score[0] == scores[row]


def test_what_ends_takes_no_place_from_what_lives():
    """The only beam goes on although the likeliest first token is the end, and finds better."""
    table = Table(batch=1, seed=0)
    table.tables[0][()] = torch.tensor([0.4, 0.1, 0.5]).log()
    table.tables[0][(0,)] = torch.tensor([0.005, 0.005, 0.99]).log()
    tokens, _, _ = beam_search(table.step, table.first(), 1, LIMIT, END, alpha=3.0)
    assert tokens.tolist() == [[0, END]]  # log(0.396) / (7/6)^3 = -0.58 > log(0.5)


@pytest.mark.parametrize(
    ("alpha", "first", "best"),
    [
        # log(0.3) / 1.5^3 = -0.36 at the fourth token beats log(0.6); at the second it would not.
        (3.0, [0.3, 0.1, 0.6], [0, 0, 0, 0]),
        # log(0.48) * 7/6 = -0.86 at the second token beats log(0.4); at the fourth it would not.
        (-1.0, [0.48, 0.12, 0.4], [0, END]),
    ],
)
def test_goes_on_while_something_can_improve(alpha, first, best):
    table = Table(batch=1, seed=0)
    for history in table.tables[0]:
        on_the_way = len(history) < len(best) and list(history) == best[: len(history)]
        likely = best[len(history)] if on_the_way else 1
        table.tables[0][history] = (12.0 * torch.eye(V)[likely]).log_softmax(-1)
    table.tables[0][()] = torch.tensor(first).log()
    tokens, _, _ = beam_search(table.step, table.first(), 2, LIMIT, END, alpha)
    assert tokens.tolist() == [best]


def test_stops_when_nothing_can_improve():
    """Where the end is all but certain at once, no further step is asked for."""
    table = Table(batch=2, seed=0)
    certain = torch.tensor([-9.0, -9.0, 0.0]).log_softmax(-1)
    for rows in table.tables:
        rows[()] = certain
    tokens, lengths, _ = beam_search(table.step, table.first(), 2, LIMIT, END, 0.6)
    assert tokens.tolist() == [[END], [END]]
    assert lengths.tolist() == [1, 1]
    assert table.steps == 0


@pytest.mark.parametrize("length", [1, 7, 50])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_length_penalty(length, alpha):
    assert length_penalty(length, alpha) == pytest.approx((5 + length) ** alpha / 6**alpha)
