"""What is learned: translation, the next token, masked tokens, classes of images and of texts.

A task holds training and held-out data and gives batches by number: the arguments of one of the
model's methods, named ``loss``, how many terms the mean has that this returns, and how many
floating-point operations the model's products need for it. Batch ``number`` is a pure function of
the data, the configuration and the number, random masks and shifts included.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedformer.transformer import train_flops as flops
from fusedformer.transformer.bert import BERTConfig
from fusedformer.transformer.data import (
    EOS,
    MASK,
    SOS,
    SPECIAL_TOKENS,
    Batches,
    Images,
    generator,
    pad,
)
from fusedformer.transformer.gpt import GPTConfig
from fusedformer.transformer.seq2seq import TransformerConfig
from fusedformer.transformer.vit import ViTConfig

Ids = Sequence[Sequence[int]]

# Of generator(seed, ...), so that no two uses of one seed draw the same numbers.
_SHIFTS, _MASKS, _MOVES, _HELD_OUT = range(4)


class Batch(NamedTuple):
    """A batch, and what is to be known of it without looking into it."""

    inputs: dict[str, Tensor]  # the arguments of the model's loss
    terms: int  # how many terms that loss is the mean of
    tokens: int  # tokens (or patches) that the model reads or predicts, without padding
    flops: float  # of the products of forward and backward


class Translation:
    """Pairs of token ids, source <eos> and <sos> target <eos>.

    Raises:
        ValueError: a sentence is longer than the model's ``max_length``.
    """

    unit, loss = "tokens", "loss"

    def __init__(
        self,
        config: TransformerConfig,
        training: tuple[Ids, Ids],
        held_out: tuple[Ids, Ids],
        batch_size: int,
        seed: int,
    ) -> None:
        self.config, self.training, self.held_out = config, training, held_out
        for name, (sources, targets) in (("training", training), ("held-out", held_out)):
            for number, pair in enumerate(zip(sources, targets, strict=True), start=1):
                longest = max(len(pair[0]), len(pair[1]) - 1)
                if longest > config.max_length:
                    raise ValueError(
                        f"{name} pair {number} has {longest} tokens, more than max_length, "
                        f"{config.max_length} (too_long=drop leaves such pairs out)"
                    )
        self.batches = Batches(_sizes(*training), batch_size, seed)
        self._held_out = Batches(_sizes(*held_out), max(batch_size, _longest(held_out)), seed)

    def terms(self, number: int) -> int:
        """How many terms the loss of a batch is the mean of."""
        return sum(len(self.training[1][i]) - 1 for i in self.batches[number].tolist())

    def batch(self, number: int) -> Batch:
        """The batch of a number."""
        return self._batch(self.training, self.batches[number])

    def held_out_batches(self) -> Iterator[Batch]:
        """All that is held out."""
        return (self._batch(self.held_out, self._held_out[i]) for i in range(len(self._held_out)))

    def _batch(self, data: tuple[Ids, Ids], index: Tensor) -> Batch:
        source, source_lengths = pad([data[0][i] for i in index.tolist()])
        target, target_lengths = pad([data[1][i] for i in index.tolist()])
        inputs = {
            "source": source,
            "target": target,
            "source_lengths": source_lengths,
            "target_lengths": target_lengths,
        }
        terms = int(target_lengths.sum()) - len(index)
        lengths = list(zip(source_lengths.tolist(), (target_lengths - 1).tolist(), strict=True))
        return Batch(
            inputs, terms, int(source_lengths.sum()) + terms, flops.seq2seq(self.config, lengths)
        )


def _sizes(sources: Ids, targets: Ids) -> Tensor:
    return torch.tensor([(len(s), len(t)) for s, t in zip(sources, targets, strict=True)])


def _longest(pairs: tuple[Ids, Ids]) -> int:
    return int(_sizes(*pairs).sum(1).max())


class NextToken:
    """A text as one stream of tokens, cut into pieces of ``max_length`` + 1.

    Each epoch cuts elsewhere, so that no token is always without the ones before it. The last token
    of a piece is the first of the next, so that all are predicted.
    """

    unit, loss = "tokens", "loss"

    def __init__(
        self,
        config: GPTConfig,
        training: Ids,
        held_out: Ids,
        batch_size: int,
        seed: int,
    ) -> None:
        self.config, self.seed = config, seed
        self.training, self.held_out = _stream(training), _stream(held_out)
        self._length = _piece_length(config.max_length, self.training, 1)
        pieces = (len(self.training) - self._length) // self._length
        sizes = torch.full((pieces,), self._length)
        self.batches = Batches(sizes, max(batch_size, self._length), seed)
        self._rows = max(1, batch_size // self._length)

    def terms(self, number: int) -> int:
        """How many terms the loss of a batch is the mean of."""
        return len(self.batches[number]) * self._length

    def batch(self, number: int) -> Batch:
        """The batch of a number."""
        epoch = self.batches.epoch(number)
        shift = torch.randint(self._length, (), generator=generator(self.seed, _SHIFTS, epoch))
        starts = self.batches[number] * self._length + shift
        index = starts[:, None] + torch.arange(self._length + 1)
        return self._of(self.training[index])

    def held_out_batches(self) -> Iterator[Batch]:
        """All that is held out, each token but the first predicted once."""
        length = min(self._length, len(self.held_out) - 1)
        pieces = self.held_out.unfold(0, length + 1, length)
        yield from map(self._of, pieces.split(self._rows))
        rest = self.held_out[len(pieces) * length :]
        if len(rest) > 1:
            yield self._of(rest[None])

    def _of(self, tokens: Tensor) -> Batch:
        rows, length = len(tokens), tokens.shape[1] - 1
        used = flops.gpt(self.config, rows, length)
        return Batch({"tokens": tokens.long()}, rows * length, rows * length, used)


class MaskedTokens:
    """A text in pieces of ``max_length``, <sos> and <eos> at the ends, some of its tokens hidden.

    Of each piece a fixed share of tokens is chosen (15% in Devlin et al. 2019, section 3.1): 80% of
    these become <mask>, 10% any token, 10% stay, and all of them are to be told.
    """

    unit, loss = "tokens", "loss"

    def __init__(
        self,
        config: BERTConfig,
        training: Ids,
        held_out: Ids,
        batch_size: int,
        seed: int,
        share: float = 0.15,
    ) -> None:
        self.config, self.seed = config, seed
        self.training, self.held_out = _stream(training), _stream(held_out)
        self._length = _piece_length(config.max_length - 2, self.training, 0)
        self._chosen = max(1, round(share * self._length))
        pieces = len(self.training) // self._length - 1
        sizes = torch.full((pieces,), self._length + 2)
        self.batches = Batches(sizes, max(batch_size, self._length + 2), seed)
        self._rows = max(1, batch_size // (self._length + 2))

    def terms(self, number: int) -> int:
        """How many terms the loss of a batch is the mean of."""
        return len(self.batches[number]) * self._chosen

    def batch(self, number: int) -> Batch:
        """The batch of a number."""
        epoch = self.batches.epoch(number)
        shift = torch.randint(self._length, (), generator=generator(self.seed, _SHIFTS, epoch))
        starts = self.batches[number] * self._length + shift
        index = starts[:, None] + torch.arange(self._length)
        return self._of(self.training[index], generator(self.seed, _MASKS, number))

    def held_out_batches(self) -> Iterator[Batch]:
        """All whole pieces that are held out, always masked alike."""
        length = min(self._length, len(self.held_out))
        pieces = self.held_out.unfold(0, length, length)
        for number, rows in enumerate(pieces.split(self._rows)):
            yield self._of(rows, generator(self.seed, _HELD_OUT, number))

    def _of(self, tokens: Tensor, draw: torch.Generator) -> Batch:
        rows, length = tokens.shape
        tokens = tokens.long()
        chosen = torch.rand(rows, length, generator=draw).argsort(1)[:, : self._chosen]
        true = tokens.gather(1, chosen)
        kind = torch.rand(true.shape, generator=draw)
        any_token = torch.randint(
            len(SPECIAL_TOKENS), self.config.vocab_size, true.shape, generator=draw
        )
        shown = torch.where(kind < 0.8, MASK, torch.where(kind < 0.9, any_token, true))
        # One more place at each end, for <sos> and <eos>.
        edge = torch.full((rows, 1), SOS), torch.full((rows, 1), EOS)
        tokens = torch.cat((edge[0], tokens.scatter(1, chosen, shown), edge[1]), dim=1)
        labels = torch.full_like(tokens, -100).scatter(1, chosen + 1, true)
        used = flops.bert(self.config, rows, length + 2, true.numel())
        return Batch({"tokens": tokens, "labels": labels}, true.numel(), tokens.numel(), used)


def _stream(documents: Ids) -> Tensor:
    return torch.tensor(list(itertools.chain.from_iterable(documents)), dtype=torch.int32)


def _piece_length(longest: int, stream: Tensor, more: int) -> int:
    """As long as the model allows, and short enough for two pieces and a shift."""
    length = min(longest, (len(stream) - more) // 3)
    if length < 1:
        raise ValueError(f"the text has {len(stream)} tokens, too few to train on")
    return length


class Classes:
    """Images with their classes; in training each is moved by up to ``shift`` pixels.

    Pixels p in 0..255 are shown as (p / 255 - mean) / std, mean and std those of the training data.
    """

    unit, loss = "images", "loss"

    def __init__(
        self,
        config: ViTConfig,
        training: Images,
        held_out: Images,
        batch_size: int,
        seed: int,
        shift: int = 0,
    ) -> None:
        self.config, self.training, self.held_out = config, training, held_out
        self.seed, self._shift, self._batch_size = seed, shift, batch_size
        scaled = training.pixels.double() / 255
        # So that a blank set of images is no division by zero.
        self.mean, self.std = float(scaled.mean()), max(float(scaled.std()), 1e-3)
        self.batches = Batches(torch.ones(len(training.labels)), batch_size, seed)

    def terms(self, number: int) -> int:
        """How many terms the loss of a batch is the mean of."""
        return len(self.batches[number])

    def batch(self, number: int) -> Batch:
        """The batch of a number."""
        images = self.training.take(self.batches[number])
        pixels, most = images.pixels, self._shift
        if most:
            draw = generator(self.seed, _MOVES, number)
            x, y = torch.randint(2 * most + 1, (2, len(pixels)), generator=draw)
            size = pixels.shape[-1]
            # What comes in at an edge repeats it.
            wide = torch.nn.functional.pad(pixels.float(), (most,) * 4, mode="replicate")
            cut = [
                image[:, j : j + size, i : i + size]
                for image, i, j in zip(wide, x.tolist(), y.tolist(), strict=True)
            ]
            pixels = torch.stack(cut)
        return self._of(pixels, images.labels)

    def held_out_batches(self) -> Iterator[Batch]:
        """All that is held out."""
        pixels = self.held_out.pixels.split(self._batch_size)
        return map(self._of, pixels, self.held_out.labels.split(self._batch_size))

    def _of(self, pixels: Tensor, labels: Tensor) -> Batch:
        images = (pixels.float() / 255 - self.mean) / self.std
        count = len(labels)
        return Batch(
            {"images": images, "labels": labels}, count, count, flops.vit(self.config, count)
        )


class TextClasses:
    """Texts, <sos> and <eos> at their ends, with their classes.

    Args:
        training, held_out: token ids of each text, and its class.

    Raises:
        ValueError: a text is longer than the model's ``max_length``.
    """

    unit, loss = "tokens", "classification_loss"

    def __init__(
        self,
        config: BERTConfig,
        training: tuple[Ids, Sequence[int]],
        held_out: tuple[Ids, Sequence[int]],
        batch_size: int,
        seed: int,
    ) -> None:
        self.config, self.training, self.held_out = config, training, held_out
        for name, (texts, _) in (("training", training), ("held-out", held_out)):
            for number, text in enumerate(texts, start=1):
                if len(text) > config.max_length:
                    raise ValueError(
                        f"{name} text {number} has {len(text)} tokens, more than max_length, "
                        f"{config.max_length} (too_long=drop leaves such texts out)"
                    )
        sizes, held_out_sizes = (torch.tensor([len(t) for t in d[0]]) for d in (training, held_out))
        self.batches = Batches(sizes, batch_size, seed)
        self._held_out = Batches(held_out_sizes, max(batch_size, int(held_out_sizes.max())), seed)

    def terms(self, number: int) -> int:
        """How many terms the loss of a batch is the mean of."""
        return len(self.batches[number])

    def batch(self, number: int) -> Batch:
        """The batch of a number."""
        return self._batch(self.training, self.batches[number])

    def held_out_batches(self) -> Iterator[Batch]:
        """All that is held out."""
        return (self._batch(self.held_out, self._held_out[i]) for i in range(len(self._held_out)))

    def _batch(self, data: tuple[Ids, Sequence[int]], index: Tensor) -> Batch:
        tokens, lengths = pad([data[0][i] for i in index.tolist()])
        labels = torch.tensor([data[1][i] for i in index.tolist()])
        used = flops.bert_classifier(self.config, lengths.tolist())
        inputs = {"tokens": tokens, "labels": labels, "lengths": lengths}
        return Batch(inputs, len(index), int(lengths.sum()), used)


Task = Translation | NextToken | MaskedTokens | Classes | TextClasses


def fingerprint(task: Task) -> str:
    """Of the training data: a run that is resumed must find the same."""
    digest = hashlib.sha256()
    parts: list[Any] = [task.training]
    if isinstance(task, Translation):
        parts = [pad(side)[0] for side in task.training]
    elif isinstance(task, Classes):
        parts = [task.training.pixels, task.training.labels]
    elif isinstance(task, TextClasses):
        parts = [pad(task.training[0])[0], torch.tensor(task.training[1])]
    for part in parts:
        digest.update(repr(part.shape).encode() + part.contiguous().numpy().tobytes())
    return digest.hexdigest()
