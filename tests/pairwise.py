"""A set of cases in which every two values of every two options meet."""

import itertools
import random
from typing import Any


def pairwise(options: dict[str, list[Any]], seed: int = 0, at_least: int = 0) -> list[dict]:
    """A covering set of strength two, greedily built; the same for the same arguments.

    Args:
        options: the values of each option.
        at_least: cases are drawn at random until there are this many.
    """
    names = list(options)
    indices = [range(len(options[name])) for name in names]
    pending = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in indices[a]
        for j in indices[b]
    }
    draw = random.Random(seed)
    cases: list[list[int]] = []
    while pending or len(cases) < at_least:
        case: list[int | None] = [None] * len(names)
        if pending:
            a, i, b, j = draw.choice(sorted(pending))
            case[a], case[b] = i, j
        for a in draw.sample(range(len(names)), len(names)):
            if case[a] is None:
                case[a] = max(indices[a], key=lambda i: (_gain(case, a, i, pending), draw.random()))
        pending -= {
            (a, case[a], b, case[b]) for a, b in itertools.combinations(range(len(names)), 2)
        }
        cases.append(case)
    return [{n: options[n][i] for n, i in zip(names, case, strict=True)} for case in cases]


def describe(case: dict) -> str:
    """A short name of a case."""
    return " ".join(str(value).replace("torch.", "") for value in case.values())


def met_by_all(options: dict[str, list[Any]], cases: list[dict]) -> bool:
    """Whether every two values of every two options meet in a case."""
    return all(
        len({(str(case[a]), str(case[b])) for case in cases}) == len(options[a]) * len(options[b])
        for a, b in itertools.combinations(options, 2)
    )


def _gain(case: list, a: int, i: int, pending: set) -> int:
    """How many pending pairs the value i of option a would meet."""
    met = 0
    for b, j in enumerate(case):
        if j is not None and b != a:
            met += ((a, i, b, j) if a < b else (b, j, a, i)) in pending
    return met
