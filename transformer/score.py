"""How likely a model holds a text to be: log-probabilities of tokens, and perplexity.

Left to right, log P(text) is the sum of log P(token | those before it). BERT sees both sides of a
token, so its sum of log P(token | all others) is a pseudo-log-likelihood (Salazar et al. 2020,
"Masked Language Model Scoring"): good to compare sentences, not a probability.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fusedformer.kernels.checks import shape
from fusedformer.transformer.bert import BERT
from fusedformer.transformer.data import EOS, MASK, SOS, encode
from fusedformer.transformer.generate import evaluation
from fusedformer.transformer.gpt import GPT
from fusedformer.transformer.layers import next_tokens
from fusedformer.transformer.seq2seq import Transformer
from fusedformer.transformer.words import token_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MASKED_COPIES = 64  # of a BERT's sentence that are run at once


@torch.no_grad()
def token_log_probs(
    model: nn.Module,
    tokens: Tensor,
    lengths: "Tensor | None" = None,
    *,
    source: "Tensor | None" = None,
    source_lengths: "Tensor | None" = None,
) -> Tensor:
    """log P of each token but the first, given those before it; without dropout.

    Args:
        model: a GPT, or a Transformer, which also reads ``source``.
        tokens: (B, N) int, right-padded, N >= 2.
        lengths: (B,) int, of tokens; None: all are full.
        source: (B, Ns) int, for a Transformer.
        source_lengths: (B,) int, of source.

    Returns:
        (B, N - 1) of the model's dtype, natural logarithms; 0 for padding.

    Raises:
        ValueError, TypeError: an argument is not as above, or does not fit the model.
    """
    if not isinstance(model, GPT | Transformer):
        raise TypeError(
            f"token_log_probs: model must be a GPT or Transformer; got {type(model).__name__}"
        )
    if isinstance(model, GPT) == (source is not None):
        raise ValueError("token_log_probs: a Transformer wants source=, and a GPT wants none")
    inputs, labels, lengths = next_tokens("token_log_probs: tokens", tokens, lengths)
    with evaluation(model):
        if isinstance(model, GPT):
            hidden = model.hidden(inputs, lengths)
        else:
            assert source is not None
            memory = model.encode(source, source_lengths)
            hidden = model.hidden(inputs, memory, source_lengths, lengths)
        return -model.cross_entropy(hidden, labels, reduction="none")


@torch.no_grad()
def masked_log_probs(model: BERT, tokens: Tensor, mask_token: int) -> Tensor:
    """log P of each token, given all others: each is masked in turn; without dropout.

    Args:
        model: a BERT.
        tokens: (N,) int, one sentence with what stands around it.
        mask_token: the id of the mask.

    Returns:
        (N,) of the model's dtype, natural logarithms.

    Raises:
        ValueError, TypeError: an argument is not as above, or does not fit the model.
    """
    if not isinstance(model, BERT):
        raise TypeError(f"masked_log_probs: model must be a BERT; got {type(model).__name__}")
    if tokens.dim() != 1:
        raise ValueError(f"masked_log_probs: tokens must be (N,); got {shape(tokens)}")
    parts = []
    with evaluation(model):
        for places in torch.arange(len(tokens), device=tokens.device).split(_MASKED_COPIES):
            masked = tokens.repeat(len(places), 1)
            row = torch.arange(len(places), device=tokens.device)
            masked[row, places] = mask_token
            hidden = model(masked)[row, places]  # of the masked token alone
            parts.append(-model.cross_entropy(hidden, tokens[places], reduction="none"))
    return torch.cat(parts)


@dataclass(frozen=True)
class Score:
    """A text's tokens in reading order, with the logarithm of each one's probability."""

    text: str
    tokens: list[str]
    log_probs: list[float]

    @property
    def log_prob(self) -> float:
        """That of the whole text."""
        return math.fsum(self.log_probs)

    @property
    def perplexity(self) -> float:
        """exp(-log_prob / tokens): how many tokens were as good as equally likely, on average."""
        return math.exp(-self.log_prob / len(self.log_probs))


def score_text(
    model: nn.Module,
    tokenizer: "Tokenizer",
    text: str,
    *,
    source: "str | None" = None,
    right_to_left: bool = False,
) -> Score:
    """The score of a text by a trained model and its tokenizer (``checkpoint.load`` gives both).

    A GPT's and a Transformer's includes that of <eos>, the text's end (or for a model that reads
    from right to left its beginning), so that texts of all lengths share the probability 1.

    Args:
        text: what is scored.
        source: what a Transformer translates to it.
        right_to_left: the GPT was trained on texts whose tokens are in reverse order.
    """
    if not text.strip():
        raise ValueError("score: the text is empty")
    (ids,) = encode(tokenizer, [text])
    device = next(model.parameters()).device
    if isinstance(model, BERT):
        tokens = torch.tensor([SOS, *ids, EOS], device=device)
        log_probs = masked_log_probs(model, tokens, MASK)[1:-1].tolist()
        return Score(text, token_texts(tokenizer, ids), log_probs)
    ids = ids[::-1] if right_to_left else ids
    tokens = torch.tensor([[SOS, *ids, EOS]], device=device)
    if isinstance(model, Transformer):
        if source is None or not source.strip():
            raise ValueError("score: a Transformer's text wants the source that it translates")
        read = torch.tensor(encode(tokenizer, [source], eos=True), device=device)
        log_probs = token_log_probs(model, tokens, source=read)[0].tolist()
    else:
        log_probs = token_log_probs(model, tokens)[0].tolist()
    words = token_texts(tokenizer, [*ids, EOS])
    if right_to_left:
        log_probs, words = log_probs[::-1], words[::-1]
    return Score(text, words, log_probs)
