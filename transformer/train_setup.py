"""From a run's data and fields to a task and a model."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fusedformer.transformer import checkpoint, data, datasets
from fusedformer.transformer.bert import BERT, BERTConfig
from fusedformer.transformer.config import ModelConfig
from fusedformer.transformer.gpt import GPT, GPTConfig
from fusedformer.transformer.presets import TrainConfig
from fusedformer.transformer.seq2seq import Transformer, TransformerConfig
from fusedformer.transformer.train_parallel import World
from fusedformer.transformer.train_tasks import (
    Classes,
    MaskedTokens,
    NextToken,
    Task,
    TextClasses,
    Translation,
)
from fusedformer.transformer.vit import ViT, ViTConfig

_KINDS = {
    "seq2seq": "pairs",
    "gpt": "text",
    "bert": "text",
    "vit": "images",
    "bert-classifier": "labelled texts",
}


class Setup(NamedTuple):
    """All that a training needs."""

    model: nn.Module
    task: Task
    tokenizer: Any  # None for images
    about: dict[str, Any]  # for config.json
    held_out: Sequence[Any] = ()  # pairs or documents, for the report


def set_up(
    run: Mapping[str, Any],
    model_config: ModelConfig,
    config: TrainConfig,
    out: Path,
    world: World,
    tell: Callable[[str], None],
) -> Setup:
    if world.rank > 0:
        world.wait()  # for the first process, which fetches what is not there yet
    training, held_out = _read(run, model_config)
    if world.rank == 0:
        world.wait()
    torch.manual_seed(config.seed)
    if isinstance(model_config, ViTConfig):
        return _images(model_config, config, training, held_out, tell)

    if run.get("start"):
        return _fine_tuning(run, config, training, held_out, tell)
    texts = training
    if run["task"] == "seq2seq":
        texts = [text for pair in training for text in pair]
    elif run["task"] == "bert-classifier":
        texts = [text for _, text in training]
    tokenizer = _tokenizer(texts, model_config, out, world)
    size: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size()}
    model_config = dataclasses.replace(model_config, **size)
    if isinstance(model_config, TransformerConfig):
        return _pairs(model_config, config, training, held_out, tokenizer, tell)
    if run["task"] == "bert-classifier":
        return _labelled(BERT, model_config, config, training, held_out, tokenizer, tell)
    return _text(model_config, config, training, held_out, tokenizer, tell)


def _read(run: Mapping[str, Any], model_config: ModelConfig) -> tuple[Any, Any]:
    """(training, held out) data."""
    kind = _KINDS[run["task"]]
    splits: dict[str, Any] = {
        "pairs": data.split_pairs,
        "text": data.split_documents,
        "images": data.split_images,
        "labelled texts": data.split_labelled,
    }
    split = splits[kind]
    whole = _read_one(run["data"], run["task"], model_config)
    if run["held_out"] is None:
        parts = split(whole)
    else:
        parts = whole, _read_one(run["held_out"], run["task"], model_config)
        if kind == "images" and parts[0].classes != parts[1].classes:
            raise ValueError(
                f"{run['held_out']} has the classes {', '.join(parts[1].classes)}; "
                f"{run['data']} has {', '.join(parts[0].classes)}"
            )
    for name, part in zip(("train on", "hold out"), parts, strict=True):
        if not len(part.labels if kind == "images" else part):
            raise ValueError(f"{run['data']} is too small: it leaves nothing to {name}")
    return parts


def _read_one(source: str, task: str, config: ModelConfig) -> Any:
    kind = _KINDS[task]
    # A folder of a data set's name, such as a run's, does not hide it; ./name is the folder.
    if source not in datasets.DATASETS and Path(source).exists():
        if kind == "pairs":
            return data.read_pairs(source)
        if kind == "text":
            return data.read_documents(source)
        if kind == "labelled texts":
            return data.read_labelled(source)
        assert isinstance(config, ViTConfig)
        return data.read_images(source, (config.channels, config.image_size, config.image_size))
    if source not in datasets.DATASETS:
        known = [name for name, found in datasets.DATASETS.items() if found.kind == kind]
        raise ValueError(
            f"data {source!r} is neither a file or folder nor a data set; those of {kind} are "
            f"{', '.join(known)}"
        )
    if datasets.DATASETS[source].kind != kind:
        raise ValueError(f"{source} holds {datasets.DATASETS[source].kind}; {task} wants {kind}")
    loaded = datasets.load(source)
    if isinstance(loaded, data.Images):
        assert isinstance(config, ViTConfig)
        wanted = (config.channels, config.image_size, config.image_size)
        if loaded.pixels.shape[1:] != wanted:
            channels, size, _ = loaded.pixels.shape[1:]
            raise ValueError(
                f"{source} has images with channels={channels}, image_size={size}; the model "
                f"wants channels={wanted[0]}, image_size={wanted[1]}"
            )
    return loaded


def _tokenizer(texts: Any, config: Any, out: Path, world: World) -> Any:
    """That of the run, else one trained on the training data by the first process."""
    found = checkpoint.steps(out)
    if found:
        return data.load_tokenizer(found[-1] / "tokenizer.json")
    made = data.train_tokenizer(texts, config.vocab_size).to_str() if world.rank == 0 else None
    return data.tokenizer_from(world.share(made))


def _pairs(
    config: TransformerConfig,
    training_config: TrainConfig,
    training: data.Pairs,
    held_out: data.Pairs,
    tokenizer: Any,
    tell: Callable[[str], None],
) -> Setup:
    parts = []
    for name, pairs in (("training", training), ("held-out", held_out)):
        sources = data.encode(tokenizer, [source for source, _ in pairs], eos=True)
        targets = data.encode(tokenizer, [target for _, target in pairs], sos=True, eos=True)
        if training_config.too_long == "drop":
            # A target's <sos> is only read and its <eos> only predicted: one position for both.
            longest = [max(len(s), len(t) - 1) for s, t in zip(sources, targets, strict=True)]
            fitting = [i for i, length in enumerate(longest) if length <= config.max_length]
            if left_out := len(pairs) - len(fitting):
                tell(f"{left_out} of {len(pairs)} {name} pairs are too long and left out")
            sources, targets = [sources[i] for i in fitting], [targets[i] for i in fitting]
            pairs = [pairs[i] for i in fitting]
        parts.append(((sources, targets), pairs))
    (training_ids, training), (held_out_ids, held_out) = parts
    size, seed = training_config.batch_size, training_config.seed
    task = Translation(config, training_ids, held_out_ids, size, seed)
    tell(
        f"{len(training):,} pairs to train on, {len(held_out):,} held out; "
        f"{config.vocab_size} kinds of token"
    )
    return Setup(Transformer(config), task, tokenizer, {"task": "seq2seq"}, held_out)


def _text(
    config: Any,
    training_config: TrainConfig,
    training: data.Documents,
    held_out: data.Documents,
    tokenizer: Any,
    tell: Callable[[str], None],
) -> Setup:
    backwards = training_config.right_to_left
    ids = []
    for texts in (training, held_out):
        encoded = data.encode(tokenizer, texts)
        ids.append(
            [[data.SOS, *(text[::-1] if backwards else text), data.EOS] for text in encoded]
        )
    training_ids, held_out_ids = ids
    counts = [sum(map(len, part)) for part in ids]
    tell(
        f"{counts[0]:,} tokens to train on, {counts[1]:,} held out; {config.vocab_size} kinds of "
        "token"
    )
    size, seed = training_config.batch_size, training_config.seed
    if isinstance(config, GPTConfig):
        task: Task = NextToken(config, training_ids, held_out_ids, size, seed)
        about = {"task": "gpt", "right_to_left": backwards}
        return Setup(GPT(config), task, tokenizer, about, held_out)
    assert isinstance(config, BERTConfig)
    masked = training_config.masked
    task = MaskedTokens(config, training_ids, held_out_ids, size, seed, masked)
    model = BERT(config)
    # Its other head has no part in this loss.
    for layer in (model.pooler, model.classifier):
        layer.requires_grad_(False)
    return Setup(model, task, tokenizer, {"task": "bert"}, held_out)


def _labelled(
    make: Callable[[BERTConfig], BERT],
    config: Any,
    training_config: TrainConfig,
    training: data.Labelled,
    held_out: data.Labelled,
    tokenizer: Any,
    tell: Callable[[str], None],
) -> Setup:
    classes = sorted({name for name, _ in training})
    if len(classes) < 2:
        raise ValueError(f"the training texts must be of two classes or more; all are {classes[0]}")
    if unknown := {name for name, _ in held_out} - set(classes):
        raise ValueError(f"of the class {min(unknown)} there are held-out texts and no others")
    number = {name: i for i, name in enumerate(classes)}
    parts = []
    for part, texts in (("training", training), ("held-out", held_out)):
        ids = data.encode(tokenizer, [text for _, text in texts], sos=True, eos=True)
        both = [(one, number[name]) for one, (name, _) in zip(ids, texts, strict=True)]
        if training_config.too_long == "drop":
            both = [one for one in both if len(one[0]) <= config.max_length]
            if left_out := len(texts) - len(both):
                tell(f"{left_out} of {len(texts)} {part} texts are too long and left out")
            if not both:
                raise ValueError(f"all {part} texts are longer than max_length")
        parts.append(([one for one, _ in both], [label for _, label in both]))
    tell(
        f"{len(parts[0][0]):,} texts to train on, {len(parts[1][0]):,} held out; "
        f"{len(classes)} classes; {config.vocab_size} kinds of token"
    )
    config = dataclasses.replace(config, classes=len(classes))
    size, seed = training_config.batch_size, training_config.seed
    task = TextClasses(config, parts[0], parts[1], size, seed)
    model = make(config)
    # The other head has no part in this loss.
    for head in (model.head_linear, model.head_norm):
        head.requires_grad_(False)
    model.head_bias.requires_grad_(False)
    return Setup(model, task, tokenizer, {"task": "bert-classifier", "labels": classes})


def _fine_tuning(
    run: Mapping[str, Any],
    training_config: TrainConfig,
    training: data.Labelled,
    held_out: data.Labelled,
    tell: Callable[[str], None],
) -> Setup:
    """A classifier that begins with the weights, sizes and tokenizer of another BERT."""
    start = run["start"]
    other, tokenizer = checkpoint.load(start)
    if not isinstance(other, BERT) or tokenizer is None:
        found = "no tokenizer.json" if isinstance(other, BERT) else f"a {type(other).__name__}"
        raise ValueError(f"start wants a BERT with its tokenizer; {start} has {found}")
    rates = ("dropout", "ff_dropout")
    own = {field.name for field in dataclasses.fields(BERTConfig)}.intersection(run["fields"])
    if fixed := own.difference(rates):
        raise ValueError(f"{min(fixed)} is that of {start} and cannot be set")
    changes: dict[str, Any] = {name: run["fields"][name] for name in own}
    config = dataclasses.replace(other.config, **changes)

    def make(config: BERTConfig) -> BERT:
        model = BERT(config)
        fresh = {f"classifier.{name}": p for name, p in model.classifier.state_dict().items()}
        model.load_state_dict(other.state_dict() | fresh)
        return model

    return _labelled(make, config, training_config, training, held_out, tokenizer, tell)


def _images(
    config: ViTConfig,
    training_config: TrainConfig,
    training: data.Images,
    held_out: data.Images,
    tell: Callable[[str], None],
) -> Setup:
    config = dataclasses.replace(config, classes=len(training.classes))
    size, seed, shift = training_config.batch_size, training_config.seed, training_config.shift
    task = Classes(config, training, held_out, size, seed, shift)
    tell(
        f"{len(training.labels):,} images to train on, {len(held_out.labels):,} held out; "
        f"{config.classes} classes"
    )
    about = {"task": "vit", "labels": training.classes, "mean": task.mean, "std": task.std}
    return Setup(ViT(config), task, None, about)
