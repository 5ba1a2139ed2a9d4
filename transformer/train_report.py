"""What a finished training has learned, measured on held-out data beside a simple baseline."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from fusedformer.transformer.data import EOS, SOS, pad
from fusedformer.transformer.generate import generate
from fusedformer.transformer.train_baselines import NaiveBayes, NGram, chrf
from fusedformer.transformer.train_tasks import (
    Classes,
    MaskedTokens,
    NextToken,
    Task,
    TextClasses,
    Translation,
)

_SENTENCES = 500  # translated at most
_BATCH = 32


@torch.no_grad()
def report(
    model: Any, task: Task, tokenizer: Any = None, held_out: Sequence[Any] = ()
) -> dict[str, float]:
    """Name -> number, a baseline after each figure. Cross-entropies are in nats a token.

    Args:
        model: trained, in eval mode, on the CPU.
        task: the one that it was trained on.
        tokenizer: of text.
        held_out: the pairs or the documents that are held out.
    """
    if isinstance(task, Translation):
        return _translation(model, task, tokenizer, held_out)
    if isinstance(task, NextToken):
        return _next_token(model, task, sum(len(text.encode()) for text in held_out))
    if isinstance(task, MaskedTokens):
        return _masked_tokens(model, task)
    return _text_classes(model, task) if isinstance(task, TextClasses) else _classes(model, task)


def _held_out_loss(model: Any, task: Task) -> float:
    total, terms = 0.0, 0
    for batch in task.held_out_batches():
        total += float(getattr(model, task.loss)(**batch.inputs)) * batch.terms
        terms += batch.terms
    return total / terms


def _translation(
    model: Any, task: Translation, tokenizer: Any, pairs: Sequence[tuple[str, str]]
) -> dict[str, float]:
    sources, targets = task.held_out
    bigram = NGram(2, task.training[1], task.config.vocab_size)
    translated: list[str] = []
    for start in range(0, min(_SENTENCES, len(pairs)), _BATCH):
        source, lengths = pad(sources[start : start + _BATCH])
        tokens, _ = generate(
            model, source=source, source_lengths=lengths, start_token=SOS, end_token=EOS,
            temperature=0.0, max_new_tokens=task.config.max_length - 1,
        )  # fmt: skip
        translated += tokenizer.decode_batch(tokens.tolist())
    originals, references = zip(*pairs[: len(translated)], strict=True)
    return {
        "cross-entropy": _held_out_loss(model, task),
        "cross-entropy of a bigram model": bigram.nats(targets) / sum(len(t) - 1 for t in targets),
        "chrF": chrf(translated, references),
        "chrF of copying the source": chrf(originals, references),
    }


def _next_token(model: Any, task: NextToken, size: int) -> dict[str, float]:
    loss, predicted = _held_out_loss(model, task), len(task.held_out) - 1
    # One sequence as it is for the model, so that both predict the same tokens.
    trigram = NGram(3, [task.training.tolist()], task.config.vocab_size)
    of_trigram = trigram.nats([task.held_out.tolist()]) / predicted
    bits = predicted / math.log(2) / size
    return {
        "cross-entropy": loss,
        "cross-entropy of a trigram model": of_trigram,
        "bits per byte": loss * bits,
        "bits per byte of a trigram model": of_trigram * bits,
    }


def _masked_tokens(model: Any, task: MaskedTokens) -> dict[str, float]:
    commonest = task.training.mode().values
    right = common = terms = 0
    for batch in task.held_out_batches():
        labels = batch.inputs["labels"]
        hidden = model(batch.inputs["tokens"])
        asked = labels >= 0
        guessed = model.masked_lm(hidden[asked]).argmax(-1)
        right += int((guessed == labels[asked]).sum())
        common += int((labels == commonest).sum())
        terms += batch.terms
    return {
        "cross-entropy": _held_out_loss(model, task),
        "masked accuracy": right / terms,
        "masked accuracy of the commonest token": common / terms,
    }


def _classes(model: Any, task: Classes) -> dict[str, float]:
    right = sum(
        int((model(batch.inputs["images"]).argmax(-1) == batch.inputs["labels"]).sum())
        for batch in task.held_out_batches()
    )
    labels = task.held_out.labels
    commonest = task.training.labels.mode().values
    return {
        "cross-entropy": _held_out_loss(model, task),
        "accuracy": right / len(labels),
        "accuracy of the commonest class": float((labels == commonest).double().mean()),
    }


def _text_classes(model: Any, task: TextClasses) -> dict[str, float]:
    right = 0
    for batch in task.held_out_batches():
        hidden = model(batch.inputs["tokens"], lengths=batch.inputs["lengths"])
        right += int((model.classify(hidden).argmax(-1) == batch.inputs["labels"]).sum())
    texts, labels = task.held_out
    bayes = NaiveBayes(*task.training, task.config.vocab_size)
    of_bayes = sum(bayes.best(text) == label for text, label in zip(texts, labels, strict=True))
    return {
        "cross-entropy": _held_out_loss(model, task),
        "accuracy": right / len(labels),
        "accuracy of naive Bayes": of_bayes / len(labels),
    }
