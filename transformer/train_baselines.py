"""What a trained model is measured against: n-grams, naive Bayes, and the chrF of translations."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

Gram = tuple[int, ...]


class NGram:
    """An n-gram model of tokens with interpolated Kneser-Ney smoothing (Chen and Goodman, 1998).

        p(w | c) = max(N(c w) - d, 0) / N(c) + d K(c) / N(c) * p(w | c without its first token)

    N counts occurrences for the longest contexts; for shorter ones, how many different tokens come
    before. K(c) is how many different tokens come after c, d = n1 / (n1 + 2 n2) where n1 and n2
    grams have N = 1 and 2. Below the empty context stands 1 / vocab_size.

    Args:
        order: 2 for a bigram model, 3 for a trigram model.
        sequences: token ids. The first of each is given, not predicted, as is <sos>.
        vocab_size: how many tokens there are.
    """

    def __init__(self, order: int, sequences: Iterable[Sequence[int]], vocab_size: int) -> None:
        self.order, self.vocab_size = order, vocab_size
        counts = Counter(gram for sequence in sequences for gram in self._grams(sequence))
        self._levels: list[_Level] = []  # by the length of their contexts
        for _ in range(order):
            self._levels.insert(0, _Level(counts))
            counts = Counter(gram[1:] for gram in counts)  # each kind of gram once

    def _grams(self, sequence: Sequence[int]) -> Iterator[Gram]:
        """One for each token but the first, which is repeated where a context is too short."""
        ids = (sequence[0],) * (self.order - 2) + tuple(sequence)
        return (ids[i : i + self.order] for i in range(len(ids) - self.order + 1))

    def probability(self, gram: Gram) -> float:
        """p(the last token | those before it), of ``order`` tokens."""
        p = 1 / self.vocab_size
        for level in range(self.order):
            p = self._levels[level].probability(gram[self.order - 1 - level :], p)
        return p

    def nats(self, sequences: Iterable[Sequence[int]]) -> float:
        """-sum of log p of every token but each sequence's first."""
        grams = (gram for sequence in sequences for gram in self._grams(sequence))
        return -sum(math.log(self.probability(gram)) for gram in grams)


class _Level:
    """The grams of one length."""

    def __init__(self, counts: "Counter[Gram]") -> None:
        ones, twos = (sum(count == n for count in counts.values()) for n in (1, 2))
        # Without grams that occur once there is nothing to estimate it by.
        self._discount = ones / (ones + 2 * twos) if ones else 0.5
        self._counts, self._total, self._kinds = counts, Counter[Gram](), Counter[Gram]()
        for gram, count in counts.items():
            self._total[gram[:-1]] += count
            self._kinds[gram[:-1]] += 1

    def probability(self, gram: Gram, lower: float) -> float:
        """Of the gram's last token; ``lower`` is that by the level below."""
        context = gram[:-1]
        total = self._total[context]
        if not total:
            return lower
        own = max(self._counts[gram] - self._discount, 0.0)
        return (own + self._discount * self._kinds[context] * lower) / total


class NaiveBayes:
    """Classes of token sequences by p(class) times the product of p(token | class), order unseen.

    Classes, and in each class all tokens, count as seen once more than they were (Laplace).

    Args:
        sequences: token ids.
        labels: the class of each, from 0.
        vocab_size: how many tokens there are.
    """

    def __init__(
        self, sequences: Iterable[Sequence[int]], labels: Sequence[int], vocab_size: int
    ) -> None:
        classes = Counter(labels)
        counts = [Counter[int]() for _ in range(max(classes) + 1)]
        for sequence, label in zip(sequences, labels, strict=True):
            counts[label].update(sequence)
        total = len(labels) + len(counts)
        self._prior = [math.log((classes[i] + 1) / total) for i in range(len(counts))]
        self._token = [
            [math.log((count[i] + 1) / (count.total() + vocab_size)) for i in range(vocab_size)]
            for count in counts
        ]

    def best(self, sequence: Sequence[int]) -> int:
        """The likeliest class."""
        scores = [
            prior + sum(of_token[token] for token in sequence)
            for prior, of_token in zip(self._prior, self._token, strict=True)
        ]
        return scores.index(max(scores))


def chrf(hypotheses: Sequence[str], references: Sequence[str], beta: float = 2.0) -> float:
    """The character n-gram F-score of translations, 0 to 100 (Popović, 2015).

    (1 + beta^2) P R / (beta^2 P + R), P and R the precision and recall of character n-grams without
    spaces, counted over all sentences that have a reference of n characters, averaged over n = 1 to
    6. So defined, scores are those of sacreBLEU's chrF2.

    Raises:
        ValueError: there are not as many references as hypotheses, or none.
    """
    if len(hypotheses) != len(references) or not references:
        raise ValueError(
            f"chrf: wants a reference for each hypothesis; got {len(hypotheses)} hypotheses and "
            f"{len(references)} references"
        )
    precisions, recalls = [], []
    for n in range(1, 7):
        matches = in_hypotheses = in_references = 0
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            ours, theirs = _characters(hypothesis, n), _characters(reference, n)
            if not theirs:
                continue  # too short to have any
            matches += (ours & theirs).total()
            in_hypotheses += ours.total()
            in_references += theirs.total()
        if in_hypotheses and in_references:
            precisions.append(matches / in_hypotheses)
            recalls.append(matches / in_references)
    precision = sum(precisions) / max(len(precisions), 1)
    recall = sum(recalls) / max(len(recalls), 1)
    if precision + recall == 0:
        return 0.0
    return 100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def _characters(text: str, n: int) -> "Counter[str]":
    text = "".join(text.split())
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))
