"""Which token comes next: pure functions of the logits.

Temperature divides the logits; top-k keeps the k likeliest tokens (Fan et al. 2018, "Hierarchical
Neural Story Generation"); top-p the likeliest that together have the probability p (Holtzman et al.
2020, "The Curious Case of Neural Text Degeneration"), of what top-k left.
"""

import math

import torch
from torch import Tensor


def check_sampling(name: str, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError, in the name of the caller, for settings out of their range."""
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"{name}: temperature must be 0 (greedy) or more; got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{name}: top_k must be at least 1, or None for all; got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{name}: top_p must be above 0 and at most 1; got {top_p}")


def filter_logits(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """The logits to sample from: divided by the temperature, -inf where a token is left out.

    The likeliest token always stays. Of equal logits those of the lower ids count as the likelier,
    so exactly ``top_k`` tokens stay, and the fewest that reach ``top_p``.

    Args:
        logits: (..., V), floating.
        temperature: above 0.
        top_k: how many tokens stay; None or V and more: all.
        top_p: the probability, of what top_k left, that those that stay have at least; None or
            1: all.

    Returns:
        (..., V) in float32.
    """
    logits = logits.float() / temperature
    k = logits.shape[-1] if top_k is None else top_k
    p = 1.0 if top_p is None else top_p
    if k >= logits.shape[-1] and p >= 1:
        return logits
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    ranked[..., k:] = -math.inf
    if p < 1:
        probs = ranked.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs  # of the tokens that are likelier
        ranked = ranked.masked_fill(before >= p, -math.inf)
    return torch.empty_like(logits).scatter_(-1, order, ranked)


def choose(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The next token of each row: the likeliest at temperature 0, else one drawn.

    A draw is the largest of logits + Gumbel noise, which has the softmax's distribution (Gumbel
    1954) and never waits for the GPU, as torch.multinomial does.

    Args:
        logits: (..., V), floating.
        temperature, top_k, top_p: as for :func:`filter_logits`; temperature may be 0.
        generator: where the noise comes from, on the logits' device; None: torch's own.

    Returns:
        (...) int64. Of equal logits at temperature 0, the lowest id.
    """
    if temperature == 0:
        # In 16 bits a CPU takes three times as long and more.
        narrow = logits.dtype in (torch.float16, torch.bfloat16)
        return (logits.float() if narrow else logits).argmax(dim=-1)
    logits = filter_logits(logits, temperature, top_k, top_p)
    exponential = torch.empty_like(logits).exponential_(generator=generator)
    # An exact 0 would be noise without end, also for the tokens left out.
    gumbel = -exponential.clamp_min_(torch.finfo(torch.float32).tiny).log_()
    return (logits + gumbel).argmax(dim=-1)
