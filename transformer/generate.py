"""Generation: a GPT continues a prompt, an encoder-decoder Transformer answers a source.

A step runs on the newest token alone, with the keys and values of those before it from a cache;
``use_cache=False`` runs on all of them again, and gives the same tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fusedformer.kernels.checks import shape
from fusedformer.transformer.beam import beam_search
from fusedformer.transformer.gpt import GPT
from fusedformer.transformer.sampling import check_sampling, choose
from fusedformer.transformer.seq2seq import Transformer

# Looking whether all rows have ended makes a GPU wait, so there it is done now and then.
_GPU_STEPS_BETWEEN_CHECKS = 16


def generate(
    model: "GPT | Transformer",
    prompt: "Tensor | None" = None,
    *,
    source: "Tensor | None" = None,
    source_lengths: "Tensor | None" = None,
    lengths: "Tensor | None" = None,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: "int | None" = None,
    top_p: "float | None" = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    start_token: "int | None" = None,
    end_token: "int | None" = None,
    use_cache: bool = True,
    seed: "int | None" = None,
) -> tuple[Tensor, Tensor]:
    """The tokens that a model writes after each prompt, without dropout and without gradients.

    Args:
        model: a GPT, which continues ``prompt``; or a Transformer, which answers ``source``.
        prompt: (B, N) int, right-padded, N >= 1. A Transformer's is the beginning of its answer;
            None stands for ``start_token`` alone.
        source: (B, Ns) int, right-padded; for a Transformer, and for it alone.
        source_lengths: (B,) int, of source; None: all are full.
        lengths: (B,) int, of prompt, each at least 1; None: all are full.
        max_new_tokens: at most so many are written.
        temperature: 0 writes the likeliest token each time (greedy); else logits are divided by it
            and a token is drawn.
        top_k: draw from the so many likeliest tokens only.
        top_p: draw from the fewest likeliest tokens that together have this probability.
        num_beams: above 1, beam search with so many hypotheses; it draws nothing.
        length_penalty: of beam search, the power alpha of ((5 + length) / 6) (Wu et al. 2016).
        start_token: what a Transformer starts at where there is no prompt.
        end_token: a row ends at it; None: every row has max_new_tokens.
        use_cache: keep keys and values; False computes them again for each token.
        seed: of the draws; None draws from torch's own generator.

    Returns:
        tokens (B, T) int64, T <= max_new_tokens, the new ones alone: each row up to and with its
        first ``end_token``, then filled up with it; and how many tokens each row has, (B,) int64.

    Raises:
        ValueError: an argument is out of its range, or prompt and new tokens do not fit into the
            model's position table.
        TypeError: the model is neither of the two.
    """
    prompt = _checked_prompt(model, prompt, source, start_token)
    _check(model, prompt, lengths, max_new_tokens, num_beams, temperature, top_k, top_p)
    check_every = 1 if prompt.device.type == "cpu" else _GPU_STEPS_BETWEEN_CHECKS
    with evaluation(model), torch.no_grad():
        rows = _Rows(model, prompt, lengths, source, source_lengths, max_new_tokens, use_cache)
        if num_beams > 1:
            return _beams(rows, num_beams, max_new_tokens, length_penalty, end_token, check_every)
        generator = None
        if seed is not None and temperature > 0:
            generator = torch.Generator(prompt.device).manual_seed(seed)
        return _sample(
            rows, max_new_tokens, end_token, check_every, temperature, top_k, top_p, generator
        )


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, so without dropout; afterwards each module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _checked_prompt(model, prompt, source, start_token) -> Tensor:
    """The prompt, for a Transformer without one its start token."""
    if not isinstance(model, GPT | Transformer):
        raise TypeError(f"generate: model must be a GPT or Transformer; got {type(model).__name__}")
    if isinstance(model, GPT) == (source is not None):
        raise ValueError("generate: a Transformer wants source=, and a GPT wants none")
    if prompt is None:
        if source is None or start_token is None:
            raise ValueError("generate: without a prompt, source and start_token are needed")
        return source.new_full((source.shape[0], 1), start_token)
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ValueError(f"generate: prompt must be (batch, 1 or more); got {shape(prompt)}")
    if source is not None and source.shape[0] != prompt.shape[0]:
        raise ValueError(
            f"generate: prompt and source must have equally many rows; got {prompt.shape[0]} and "
            f"{source.shape[0]}"
        )
    return prompt


def _check(
    model, prompt, lengths, max_new_tokens, num_beams, temperature, top_k, top_p
) -> None:
    check_sampling("generate", temperature, top_k, top_p)
    if lengths is not None:
        if lengths.shape != prompt.shape[:1]:
            raise ValueError(
                f"generate: lengths must be ({prompt.shape[0]},); got {shape(lengths)}"
            )
        if lengths.device.type == "cpu":  # a GPU would have to wait for them
            low, high = lengths.aminmax()
            if low < 1 or high > prompt.shape[1]:
                raise ValueError(
                    f"generate: lengths must be from 1 to {prompt.shape[1]}; got {low} to {high}"
                )
    if max_new_tokens < 1 or num_beams < 1:
        raise ValueError(
            "generate: max_new_tokens and num_beams must be at least 1; got "
            f"{max_new_tokens} and {num_beams}"
        )
    if num_beams > 1 and (temperature != 1 or top_k is not None or top_p is not None):
        raise ValueError("generate: beam search draws nothing: no temperature, top_k or top_p")
    # The last new token is never read.
    positions, limit = prompt.shape[1] + max_new_tokens - 1, model.config.max_length
    if positions > limit:
        raise ValueError(
            f"generate: a prompt of {prompt.shape[1]} tokens and {max_new_tokens} new ones need "
            f"{positions} positions; the model has {limit}"
        )


class _Rows:
    """A batch that is being written: gives the logits after each row's last token.

    With a cache each call brings one new token for each row; without one, self.tokens holds all.
    """

    def __init__(self, model, prompt, lengths, source, source_lengths, max_new_tokens, use_cache):
        self.model = model
        self.batch, self.start = prompt.shape
        self.device = prompt.device
        self.lengths, self.source_lengths = lengths, source_lengths
        self.memory = None if source is None else model.encode(source, source_lengths)
        self.cache = None
        if use_cache:
            self.cache = model.new_cache(self.batch, self.start + max_new_tokens - 1)
        self.tokens = prompt

    def first(self) -> Tensor:
        """Logits (B, V) after the prompt."""
        last = None if self.lengths is None else self.lengths.long() - 1
        return self._logits(self.tokens, self.lengths, last)

    def after(self, new: Tensor) -> Tensor:
        """Logits (B, V) after the new tokens so far, (B, t)."""
        if self.cache is not None:
            return self._logits(new[:, -1:])
        if self.lengths is None:
            return self._logits(torch.cat([self.tokens, new], dim=1))
        # Each row's new tokens go where its prompt ends.
        count = new.shape[1]
        places = self.lengths.long()[:, None] + torch.arange(count, device=self.device)
        tokens = torch.cat([self.tokens, torch.zeros_like(new)], dim=1).scatter(1, places, new)
        return self._logits(tokens, self.lengths + count, places[:, -1])

    def _logits(
        self, tokens: Tensor, lengths: "Tensor | None" = None, last: "Tensor | None" = None
    ) -> Tensor:
        """(B, V) of the positions last, (B,); None: of the last one."""
        if self.memory is None:
            hidden = self.model.hidden(tokens, lengths, self.cache)
        else:
            hidden = self.model.hidden(
                tokens, self.memory, self.source_lengths, lengths, self.cache
            )
        if last is None:
            hidden = hidden[:, -1]
        else:
            hidden = hidden[torch.arange(self.batch, device=self.device), last]
        return self.model.logits(hidden)

    def take(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was; there may be more rows, or fewer."""
        self.batch = index.shape[0]
        self.tokens = self.tokens[index]
        if self.lengths is not None:
            self.lengths = self.lengths[index]
        if self.memory is not None:
            self.memory = self.memory[index]
        if self.source_lengths is not None:
            self.source_lengths = self.source_lengths[index]
        if self.cache is not None:
            self.cache.reorder(index)


def _sample(rows, max_new_tokens, end_token, check_every, *settings) -> tuple[Tensor, Tensor]:
    """One token after the other, the likeliest or drawn."""
    fill = 0 if end_token is None else end_token
    tokens = torch.full((rows.batch, max_new_tokens), fill, device=rows.device)
    live = torch.arange(rows.batch, device=rows.device)  # the rows of tokens that rows holds
    ended = torch.zeros_like(live, dtype=torch.bool)
    logits = rows.first()
    for step in range(max_new_tokens):
        token = choose(logits, *settings).masked_fill(ended, fill)
        tokens[live, step] = token
        if step + 1 == max_new_tokens:
            break
        if end_token is not None:
            ended |= token == end_token
            if (step + 1) % check_every == 0:
                left = int((~ended).sum())
                if left == 0:
                    break
                if 2 * left <= live.shape[0]:  # worth copying the cache for
                    kept = (~ended).nonzero()[:, 0]
                    live, ended = live[kept], ended[kept]
                    rows.take(kept)
        logits = rows.after(tokens[live, : step + 1])
    if end_token is None:
        return tokens, torch.full_like(tokens[:, 0], max_new_tokens)
    is_end = tokens == end_token
    lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, max_new_tokens)
    return tokens[:, : int(lengths.max())], lengths


def _beams(rows, beams, max_new_tokens, alpha, end_token, check_every) -> tuple[Tensor, Tensor]:
    def log_probs(logits: Tensor) -> Tensor:
        return logits.float().log_softmax(-1)

    def step(tokens: Tensor, parents: Tensor) -> Tensor:
        rows.take(parents)
        return log_probs(rows.after(tokens))

    first = log_probs(rows.first())
    rows.take(torch.arange(rows.batch, device=rows.device).repeat_interleave(beams))
    tokens, lengths, _ = beam_search(
        step, first, beams, max_new_tokens, end_token, alpha, check_every
    )
    return tokens, lengths
