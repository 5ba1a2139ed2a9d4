"""The n-gram models and chrF, against values computed by hand."""

import math
import random

import pytest

from fusedformer.transformer.train_baselines import NaiveBayes, NGram, chrf


def test_bigram_by_hand():
    # Bigrams: 0-1 twice, 1-2, 1-1, 1-0 once: n1 = 3, n2 = 1, d = 3/5.
    # Unigram level, kinds of bigram: *-1: 2, *-2: 1, *-0: 1: n1 = 2, n2 = 1, d = 1/2.
    model = NGram(2, [[0, 1, 2], [0, 1, 1, 0]], vocab_size=4)
    unigram = {
        0: (1 - 1 / 2) / 4 + 1 / 2 * 3 / 4 / 4,
        1: (2 - 1 / 2) / 4 + 1 / 2 * 3 / 4 / 4,
        3: 0 + 1 / 2 * 3 / 4 / 4,
    }
    assert model.probability((1, 0)) == pytest.approx((1 - 3 / 5) / 3 + 3 / 5 * 3 / 3 * unigram[0])
    assert model.probability((0, 1)) == pytest.approx((2 - 3 / 5) / 2 + 3 / 5 * 1 / 2 * unigram[1])
    assert model.probability((0, 3)) == pytest.approx(3 / 5 * 1 / 2 * unigram[3])
    assert model.probability((3, 1)) == pytest.approx(unigram[1])
    expected = -math.log(model.probability((0, 1))) - math.log(model.probability((1, 0)))
    assert model.nats([[0, 1, 0], [1]]) == pytest.approx(expected)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_sum_to_one(order):
    draw = random.Random(0)
    sequences = [draw.choices(range(6), [5, 3, 2, 1, 1, 0], k=40) for _ in range(5)]
    model = NGram(order, sequences, vocab_size=6)
    for _ in range(20):
        context = tuple(draw.choices(range(6), k=order - 1))
        total = sum(model.probability((*context, token)) for token in range(6))
        assert total == pytest.approx(1)


def test_longer_contexts_predict_what_needs_them():
    sequences = [[0, 1, 2, 0, 2, 1] * 20]  # after 1, and after 2, the token before decides
    nats = [NGram(order, sequences, 3).nats([[0, 1, 2, 0, 2, 1, 0, 1]]) for order in (1, 2, 3)]
    assert nats[2] < nats[1] / 2 < nats[0]


def test_naive_bayes_by_hand():
    # Class 0: (2 + 1) / (3 + 2) times 3/5 for token 0, 1/5 for token 1; class 1: 2/5, 1/4, 2/4.
    model = NaiveBayes([[0], [0], [1]], [0, 0, 1], vocab_size=3)
    assert [model.best(text) for text in ([], [0], [1], [1, 1])] == [0, 0, 1, 1]
    # 3/5 (3/5)^k (1/5)^n against 2/5 (1/4)^k (1/2)^n: at n = 2 k, 1.5 times (9.6/25)^k.
    assert [model.best([0] * k + [1] * 2 * k) for k in (0, 1)] == [0, 1]
    assert model.best([0, 0, 1]) == 0


def test_chrf_by_hand():
    # n = 1: 2 of 2, 2 of 3; n = 2: 1 of 1, 1 of 2; no longer ones. P = 1, R = 7/12.
    assert chrf(["ab"], ["a bc"]) == pytest.approx(100 * 5 * 7 / 12 / (4 + 7 / 12))
    assert chrf(["ab"], ["abc"], beta=1) == pytest.approx(100 * 2 * 7 / 12 / (1 + 7 / 12))
    # "aab" has one "a" more than "ab": a match counts once.
    assert chrf(["aab"], ["ab"]) == pytest.approx(
        100 * 5 * ((2 / 3 + 1 / 2) / 2) * 1 / (4 * (2 / 3 + 1 / 2) / 2 + 1)
    )
    # Over all sentences, not a mean of theirs: n = 1 alone, 1 of 2, 1 of 2.
    assert chrf(["a", "b"], ["a", "c"]) == pytest.approx(50)
    # "b" has no pair of characters, so "bc" is no wrong pair: n = 1: 3 of 4, 3 of 3; n = 2: 1, 1.
    assert chrf(["aa", "bc"], ["aa", "b"]) == pytest.approx(100 * 5 * 0.875 / (4 * 0.875 + 1))
    assert chrf(["the same text"], ["the same text"]) == pytest.approx(100)
    assert chrf(["abc"], ["xyz"]) == chrf([""], ["xyz"]) == 0
    with pytest.raises(ValueError, match="1 hypotheses and 2 references"):
        chrf(["a"], ["a", "b"])
