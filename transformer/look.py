"""Everything that ``fusedformer attention-map`` draws of a model and a text, as data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusedformer.transformer.attention_maps import attention_weights
from fusedformer.transformer.bert import BERT
from fusedformer.transformer.data import EOS, MASK, SOS, encode
from fusedformer.transformer.generate import evaluation, generate
from fusedformer.transformer.gpt import GPT
from fusedformer.transformer.layers import Rotary, sinusoidal_positions
from fusedformer.transformer.seq2seq import Transformer
from fusedformer.transformer.vit import ViT
from fusedformer.transformer.words import labels

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Model = Transformer | GPT | BERT | ViT

MAX_WORDS = 256  # a map of more could not be read, and would take much memory
MAX_POSITIONS = 128  # of the positional encoding
LIKELIEST = 5  # words shown of a distribution


@dataclass(frozen=True)
class Attention:
    """The weights of one kind of attention, of all its layers."""

    name: str  # "encoder", "decoder", "cross" or "self": goes into names of files
    title: str
    queries: list[str]  # the words that look
    keys: list[str]  # the words that they look at
    weights: Tensor  # (layers, heads, queries, keys) float32; each row adds up to 1


@dataclass(frozen=True)
class Prediction:
    """One step: what was read last, the word that comes next, and what the model held for it."""

    read: str
    target: str
    before: list[tuple[str, float]]  # the likeliest words and their probabilities, untrained
    after: list[tuple[str, float]]  # trained
    target_before: float  # the target's probability, untrained
    target_after: float


@dataclass(frozen=True)
class Look:
    """All that is drawn of one model and one text, or image."""

    title: str
    about: str
    attentions: list[Attention]
    positions: Tensor  # (positions, dimensions) float32
    positions_about: str
    predictions: list[Prediction]


def look_at_text(
    model: Model,
    tokenizer: "Tokenizer",
    text: str,
    target: "str | None" = None,
    right_to_left: bool = False,
) -> Look:
    """What a Transformer, GPT or BERT looks at while it reads a text, and predicts.

    Args:
        model: trained; beside it stands a model of the same configuration with random weights.
        tokenizer: the model's.
        text: what is read; a Transformer's source.
        target: a Transformer's translation; None: its own, greedy.
        right_to_left: the GPT was trained on texts whose tokens are in reverse order.

    Raises:
        ValueError: the text is empty, too long for the model or for a map, or target is given to
            another model.
    """
    if not text.strip():
        raise ValueError("attention-map: the text is empty")
    if target is not None and not isinstance(model, Transformer):
        raise ValueError("attention-map: only a Transformer has a target beside its text")
    (ids,) = encode(tokenizer, [text])
    if isinstance(model, Transformer):
        attentions, predictions = _transformer(model, tokenizer, ids, target)
    elif isinstance(model, BERT):
        attentions, predictions = _bert(model, tokenizer, ids)
    elif isinstance(model, GPT):
        attentions, predictions = _gpt(model, tokenizer, ids[::-1] if right_to_left else ids)
    else:
        raise TypeError(f"look_at_text: a {type(model).__name__} reads no text")
    about = _about(model) + (" It reads from right to left." if right_to_left else "")
    return Look(text.strip(), about, attentions, *_positions(model), predictions)


def look_at_image(model: ViT, image: Tensor, title: str) -> Look:
    """Which parts of an image a ViT's patches look at.

    Args:
        image: (channels, size, size), as the model was trained on.
        title: what the image is called.
    """
    rows = model.config.image_size // model.config.patch_size
    words = ["class", *(f"{row + 1},{column + 1}" for row in range(rows) for column in range(rows))]
    _check_size(len(words))
    weights = attention_weights(model, image[None])["encoder.self_attention"][:, 0]
    heading = "Encoder: patches (row, column) look at patches"
    attention = Attention("encoder", heading, words, words, weights.cpu())
    return Look(title, _about(model), [attention], *_positions(model), [])


# --- The three models of text ---------------------------------------------------------------------


def _transformer(
    model: Transformer, tokenizer: "Tokenizer", ids: list[int], target: "str | None"
) -> tuple[list[Attention], list[Prediction]]:
    source = _tensor(model, [[*ids, EOS]])
    _check_size(source.shape[1])
    if target is None:
        room = min(MAX_WORDS, model.config.max_length)
        written, lengths = generate(
            model, source=source, max_new_tokens=room, temperature=0, start_token=SOS, end_token=EOS
        )
        targets = written[0, : lengths[0]].tolist()
    else:
        targets = [*encode(tokenizer, [target])[0], EOS]
    read = _tensor(model, [[SOS, *targets[:-1]]])
    _check_size(read.shape[1])
    found = attention_weights(model, source, read)
    sources, words = (labels(tokenizer, row[0].tolist()) for row in (source, read))
    attentions = [
        Attention(name, title, queries, keys, found[kind][:, 0].cpu())
        for name, title, kind, queries, keys in (
            ("encoder", "Encoder", "encoder.self_attention", sources, sources),
            ("decoder", "Decoder", "decoder.self_attention", words, words),
            ("cross", "Decoder to encoder", "decoder.cross_attention", words, sources),
        )
    ]
    distributions = [_probs(one, lambda one: one(source, read)[0]) for one in _both(model)]
    return attentions, _predictions(tokenizer, words, targets, *distributions)


def _gpt(
    model: GPT, tokenizer: "Tokenizer", ids: list[int]
) -> tuple[list[Attention], list[Prediction]]:
    read = _tensor(model, [[SOS, *ids]])
    _check_size(read.shape[1])
    words = labels(tokenizer, read[0].tolist())
    weights = attention_weights(model, read)["stack.self_attention"][:, 0]
    attention = Attention("self", "Each word looks at those before it", words, words, weights.cpu())
    distributions = [_probs(one, lambda one: one(read)[0, :-1]) for one in _both(model)]
    return [attention], _predictions(tokenizer, words[:-1], ids, *distributions)


def _bert(
    model: BERT, tokenizer: "Tokenizer", ids: list[int]
) -> tuple[list[Attention], list[Prediction]]:
    """Each word is masked in turn for its prediction; the weights are of the text as it is."""
    read = _tensor(model, [SOS, *ids, EOS])
    _check_size(len(read))
    words = labels(tokenizer, read.tolist())
    weights = attention_weights(model, read[None])["encoder.self_attention"][:, 0]
    attention = Attention("encoder", "Each word looks at all", words, words, weights.cpu())
    places = torch.arange(1, len(ids) + 1)
    masked = read.repeat(len(ids), 1)
    masked[places - 1, places] = MASK

    def logits(one: BERT) -> Tensor:
        return one.masked_lm(one(masked)[places - 1, places])

    around = [f"{words[i - 1]} ▢ {words[i + 1]}" for i in places.tolist()]
    distributions = [_probs(one, logits) for one in _both(model)]
    return [attention], _predictions(tokenizer, around, ids, *distributions)


def _check_size(words: int) -> None:
    if words > MAX_WORDS:
        raise ValueError(f"attention-map: {words} tokens are too many to draw, over {MAX_WORDS}")


def _tensor(model: Model, ids: list) -> Tensor:
    return torch.tensor(ids, device=next(model.parameters()).device)


def _both(model: Any) -> list[Any]:
    """A model of the same configuration with random weights, always the same, and the model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = type(model)(model.config)
    return [untrained.to(next(model.parameters()).device), model]


@torch.no_grad()
def _probs(model, logits) -> Tensor:
    with evaluation(model):
        return logits(model).float().softmax(-1).cpu()


def _predictions(
    tokenizer: "Tokenizer", read: Sequence[str], targets: list[int], before: Tensor, after: Tensor
) -> list[Prediction]:
    """before and after: (steps, V)."""

    def likeliest(probs: Tensor) -> list[tuple[str, float]]:
        top = probs.topk(min(LIKELIEST, len(probs)))
        words = labels(tokenizer, top.indices.tolist())
        return list(zip(words, top.values.tolist(), strict=True))

    return [
        Prediction(
            word, name, likeliest(untrained), likeliest(trained), float(untrained[id]),
            float(trained[id]),
        )
        for word, name, id, untrained, trained in zip(
            read, labels(tokenizer, targets), targets, before, after, strict=True
        )
    ]  # fmt: skip


# --- The model ------------------------------------------------------------------------------------


def _about(model: Model) -> str:
    config, name = model.config, type(model).__name__
    layers = f"{config.layers} layers"
    if isinstance(model, Transformer):
        layers = f"{config.layers} + {config.layers} layers"
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return (
        f"{name}, {layers} of {config.heads} heads, d_model {config.d_model}, "
        f"{millions:.3g} million parameters."
    )


def _positions(model: Model) -> tuple[Tensor, str]:
    """The first positions' encoding, (positions, dimensions), and what it is."""
    if isinstance(model, Transformer):
        first = torch.arange(min(model.config.max_length, MAX_POSITIONS))
        about = "Added to a word's embedding: sines and cosines of its position, slower and slower."
        return sinusoidal_positions(first, model.config.d_model), about
    if isinstance(model, GPT) and model.config.rotary:
        first = torch.arange(min(model.config.max_length, MAX_POSITIONS))
        rotary = Rotary(first, model.config.d_model // model.config.heads)
        about = "Rotary: cosines, then sines, of the angles by which queries and keys are turned."
        return torch.cat([rotary.cos[0], rotary.sin[0]], dim=-1), about
    table = model.position_embedding
    weight = table.weight if isinstance(table, nn.Embedding) else table
    assert weight is not None
    return weight[:MAX_POSITIONS].detach().float().cpu(), "Added to a word's embedding, as learned."
