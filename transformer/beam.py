"""Beam search over any function that gives the log-probabilities of the next token.

Hypotheses compete by log P(Y) / ((5 + |Y|) / 6)^alpha (Wu et al. 2016, "Google's Neural Machine
Translation System", eq. 14, without its coverage term).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def length_penalty(length: "int | Tensor", alpha: float) -> "float | Tensor":
    """((5 + length) / 6)^alpha: 1 for a single token, and for alpha = 0."""
    return ((5 + length) / 6) ** alpha


def beam_search(
    step: Callable[[Tensor, Tensor], Tensor],
    log_probs: Tensor,
    beams: int,
    max_new_tokens: int,
    end_token: "int | None" = None,
    alpha: float = 1.0,
    check_every: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best hypothesis found for each row of a batch.

    Each step extends the ``beams`` live hypotheses of a row by every token. Those that end leave
    for the row's list of the best finished ones; the likeliest that do not end live on. A row is
    done when no live hypothesis, whatever follows, can beat its best finished one. Where nothing
    is cut (beams as many as there are hypotheses) the search is exhaustive.

    Args:
        step: (tokens (B * beams, t), parents (B * beams,)) -> log-probabilities (B * beams, V) of
            what follows each of these rows, all their new tokens so far. ``parents`` says which
            row of the call before each continues, for caches; before the first call, the rows of
            one prompt, which stand side by side, are all the same.
        log_probs: (B, V), of the first new token, in float32.
        beams: live hypotheses for each row, at least 1.
        max_new_tokens: hypotheses that reach this many tokens stand as they are.
        end_token: ends a hypothesis and counts as one of its tokens; None: nothing does.
        alpha: above 0 prefers longer hypotheses, below 0 shorter ones, 0 the likeliest.
        check_every: how many steps lie between two looks at whether all rows are done, each of
            which waits for the device.

    Returns:
        tokens (B, T) int64 with T <= max_new_tokens, filled up with ``end_token``; how many
        tokens each has (B,) int64; the score of each (B,) float32.
    """
    batch, vocab = log_probs.shape
    device = log_probs.device
    first_row = torch.arange(batch, device=device)[:, None] * beams  # (B, 1)
    # Every row starts with one hypothesis, which has no tokens; the others are placeholders.
    live = torch.full((batch, beams), -math.inf, device=device)  # log P
    live[:, 0] = 0
    tokens = torch.zeros(batch, beams, 0, dtype=torch.int64, device=device)
    fill = 0 if end_token is None else end_token
    best = torch.full((batch, max_new_tokens), fill, dtype=torch.int64, device=device)
    best_score = torch.full((batch,), -math.inf, device=device)
    best_length = torch.zeros(batch, dtype=torch.int64, device=device)
    log_probs = log_probs.repeat_interleave(beams, 0)

    for length in range(1, max_new_tokens + 1):
        total = live[:, :, None] + log_probs.view(batch, beams, vocab)
        # Of 2 * beams candidates at most `beams` end, so enough are left to live on.
        count = min(2 * beams, beams * vocab)
        total, index = total.view(batch, -1).topk(count)  # (B, count), best first
        token, beam = index % vocab, index // vocab
        final = length == max_new_tokens
        ends = torch.full_like(token, final, dtype=torch.bool)
        if end_token is not None:
            ends |= token == end_token

        # The best that ends now is the first, as all of a step are equally long.
        score, at = (total / length_penalty(length, alpha)).masked_fill(~ends, -math.inf).max(-1)
        better = score > best_score
        hypothesis = torch.cat([_rows(tokens, _rows(beam, at)), _rows(token, at)[:, None]], dim=1)
        best[:, :length] = torch.where(better[:, None], hypothesis, best[:, :length])
        best_score = torch.where(better, score, best_score)
        best_length = torch.where(better, length, best_length)
        if final:
            break

        live, kept = total.masked_fill(ends, -math.inf).topk(beams)
        beam, token = beam.gather(1, kept), token.gather(1, kept)
        tokens = torch.cat([_rows(tokens, beam), token[:, :, None]], dim=2)
        if length % check_every == 0 and _done(live, best_score, length, max_new_tokens, alpha):
            break
        log_probs = step(tokens.view(batch * beams, length), (first_row + beam).flatten())

    return best[:, : int(best_length.max())], best_length, best_score


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """values (B, K, ...) at index (B,) or (B, J): (B, ...) or (B, J, ...)."""
    batch = torch.arange(values.shape[0], device=values.device)
    return values[batch.view(-1, *[1] * (index.dim() - 1)), index]


def _done(live: Tensor, best_score: Tensor, length: int, limit: int, alpha: float) -> bool:
    """Whether no live hypothesis can beat the best; waits for the device."""
    # log P only falls as tokens come, and is negative: at best it stays, over the largest penalty.
    largest = max(length_penalty(length + 1, alpha), length_penalty(limit, alpha))
    return bool((live[:, 0] / largest <= best_score).all())
