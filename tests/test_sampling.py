"""The next token: top-k and top-p against their definitions in plain Python, draws by frequency."""

import math

import pytest
import torch

from fusedformer.transformer.sampling import check_sampling, choose, filter_logits

V = 12


def kept_by_definition(logits, temperature, top_k, top_p):
    """The ids that stay, one token at a time, in float64."""
    weights = [math.exp(value / temperature) for value in logits]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])[:top_k]
    total, reached, kept = sum(weights[token] for token in order), 0.0, set()
    for token in order:
        kept.add(token)
        reached += weights[token] / total
        if top_p is not None and reached >= top_p:
            break
    return kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, V, 99])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.9, 1.0])
def test_filter_keeps_what_the_definition_keeps(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits = 2 * torch.randn(20, V)
    filtered = filter_logits(logits, temperature, top_k, top_p)
    for row, out in zip(logits, filtered, strict=True):
        kept = kept_by_definition(row.tolist(), temperature, top_k, top_p)
        assert set(out.isfinite().nonzero().flatten().tolist()) == kept
        index = sorted(kept)
        assert torch.equal(out[index], row[index] / temperature)


def test_ties_are_cut_at_exactly_k_and_p():
    logits = torch.zeros(2, V)
    assert filter_logits(logits, top_k=3).isfinite().sum(-1).tolist() == [3, 3]
    kept = filter_logits(torch.zeros(8), top_p=0.5).isfinite()  # eighths are exact
    assert kept.nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_tokens_that_are_impossible_stay_so():
    logits = torch.tensor([0.0, -math.inf, 0.0, -math.inf])
    assert filter_logits(logits, top_k=3).isfinite().tolist() == [True, False, True, False]
    assert set(choose(logits.expand(200, 4)).tolist()) == {0, 2}


def test_temperature_0_is_greedy_and_a_tie_the_lowest_id():
    logits = torch.tensor([[1.0, 5.0, 5.0, -math.inf], [9.0, 0.0, 9.0, 9.0]])
    assert choose(logits, temperature=0).tolist() == [1, 0]
    assert choose(logits[:1], top_k=1).tolist() == [1]
    assert choose(logits.half(), temperature=0).tolist() == [1, 0]
    near = torch.tensor([1.0, 1 + 1e-12], dtype=torch.float64)
    assert choose(near, temperature=0) == 1


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (4, None), (None, 0.8), (5, 0.9)])
def test_draws_have_the_distribution(top_k, top_p):
    """Pearson's chi-squared over the kept tokens: the seed is fixed, and so the outcome."""
    logits = torch.linspace(-1, 1.5, V)
    draws = 40_000
    generator = torch.Generator().manual_seed(1)
    drawn = choose(logits.expand(draws, V), 0.7, top_k, top_p, generator)
    expected = draws * filter_logits(logits, 0.7, top_k, top_p).double().softmax(-1)
    counts = drawn.bincount(minlength=V).double()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi2 = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    # Its mean is the degrees of freedom, its variance twice that: four standard deviations.
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_a_seed_gives_the_same_draws():
    logits = torch.randn(50, V)
    first, again, other = (
        choose(logits, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-1.0, None, None), "temperature must be 0 .greedy. or more; got -1"),
        ((math.nan, None, None), "temperature .* got nan"),
        ((1.0, 0, None), "top_k must be at least 1.* got 0"),
        ((1.0, None, 0.0), "top_p must be above 0 and at most 1; got 0"),
        ((1.0, None, 1.5), "top_p .* got 1.5"),
        ((1.0, None, math.nan), "top_p .* got nan"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=f"generate: {message}"):
        check_sampling("generate", *settings)
