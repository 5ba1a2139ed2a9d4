"""How to train: the fields of a training, and presets of them together with a model's sizes."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fusedformer.transformer.bert import BERTConfig
from fusedformer.transformer.config import ModelConfig
from fusedformer.transformer.gpt import GPTConfig
from fusedformer.transformer.seq2seq import TransformerConfig
from fusedformer.transformer.vit import ViTConfig


def _field(default: Any, about: str) -> Any:
    return dataclasses.field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained, whatever it learns."""

    steps: int = _field(100_000, "steps of the optimizer")
    batch_size: int = _field(
        8192, "tokens (vit: images) of a batch on each device, padding included, at most"
    )
    accumulate: int = _field(1, "batches for each step, on each device")
    learning_rate: float = _field(6e-4, "the highest")
    schedule: str = _field("cosine", "after the warm-up: cosine, inverse_sqrt or constant")
    warmup: int = _field(1000, "steps in which the learning rate rises to it")
    final_rate: float = _field(0.1, "the last learning rate of cosine, as a part of the highest")
    weight_decay: float = _field(0.1, "AdamW's, of matrices alone")
    beta1: float = _field(0.9, "AdamW's")
    beta2: float = _field(0.95, "AdamW's")
    adam_eps: float = _field(1e-8, "AdamW's")
    clip: float = _field(1.0, "the gradient's norm at most; 0 does not clip")
    label_smoothing: float = _field(0.0, "the part of each label that is spread over all")
    dtype: str = _field("float32", "of the products: float32 or bfloat16 (autocast)")
    checkpoint_activations: bool = _field(
        False, "compute each layer's activations again in the backward instead of keeping them"
    )
    compile: bool = _field(False, "torch.compile")
    too_long: str = _field("error", "what is longer than max_length: error, or drop (left out)")
    masked: float = _field(0.15, "the part of the tokens that BERT is to tell")
    right_to_left: bool = _field(False, "the text model reads each document from its end")
    shift: int = _field(0, "images are moved by up to so many pixels")
    seed: int = _field(0, "of the first weights, the order of the data, masks and dropout")
    log_every: int = _field(50, "steps between lines of metrics")
    evaluate_every: int = _field(500, "steps between held-out losses")
    evaluate_batches: int = _field(50, "held-out batches at most; the report at the end takes all")
    save_every: int = _field(500, "steps between checkpoints")
    keep: int = _field(2, "how many of the newest checkpoints stay")

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                limit = f"{low} or more" if high == math.inf else f"from {low} to {high}"
                raise ValueError(f"{name} must be {limit}; got {getattr(self, name)}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}"
                )


_RANGES = {
    **dict.fromkeys(("steps", "batch_size", "accumulate", "keep"), (1, math.inf)),
    **dict.fromkeys(("log_every", "evaluate_every", "save_every"), (1, math.inf)),
    **dict.fromkeys(("evaluate_batches",), (1, math.inf)),
    **dict.fromkeys(("learning_rate", "warmup", "weight_decay", "clip", "shift"), (0, math.inf)),
    **dict.fromkeys(("label_smoothing", "masked", "final_rate", "beta1", "beta2"), (0, 1)),
}
_CHOICES = {
    "schedule": ("cosine", "inverse_sqrt", "constant"),
    "dtype": ("float32", "bfloat16"),
    "too_long": ("error", "drop"),
}

# A run that is resumed may change these; with any other it would be another run.
CHANGEABLE = ("steps", "log_every", "evaluate_every", "evaluate_batches", "save_every", "keep")

CONFIGS: dict[str, type[ModelConfig]] = {
    "seq2seq": TransformerConfig,
    "gpt": GPTConfig,
    "bert": BERTConfig,
    "vit": ViTConfig,
    "bert-classifier": BERTConfig,
}

# Section 5 of Vaswani et al. 2017; the highest learning rate is (d_model warmup)^-0.5.
_PAPER = {
    "schedule": "inverse_sqrt",
    "warmup": 4000,
    "batch_size": 25_000,
    "beta2": 0.98,
    "adam_eps": 1e-9,
    "weight_decay": 0.0,
    "clip": 0.0,
    "label_smoothing": 0.1,
}
_GPT_2 = {"dtype": "bfloat16", "batch_size": 16 * 1024, "accumulate": 32, "warmup": 2000}
_BERT = {
    "dtype": "bfloat16",
    "batch_size": 64 * 512,
    "accumulate": 4,
    "learning_rate": 1e-4,
    "warmup": 10_000,
    "steps": 1_000_000,
    "beta2": 0.999,
    "weight_decay": 0.01,
}
# Appendix A.3 of Devlin et al. 2019.
_FINE_TUNING = {
    "dtype": "bfloat16",
    "batch_size": 32 * 128,
    "learning_rate": 2e-5,
    "warmup": 1000,
    "steps": 10_000,
    "beta2": 0.999,
    "weight_decay": 0.01,
}
_VIT = {
    "dtype": "bfloat16",
    "batch_size": 512,
    "accumulate": 8,
    "learning_rate": 3e-3,
    "warmup": 10_000,
    "weight_decay": 0.3,
    "beta2": 0.999,
}

# task -> preset -> "data" and fields of the model's and the training's configuration. "small"
# learns in minutes on a CPU; the others are the published sizes.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "seq2seq": {
        "small": {
            "data": "homeassistant-ko-en",
            "vocab_size": 2000,
            "d_model": 128,
            "layers": 2,
            "heads": 4,
            "d_ff": 512,
            "dropout": 0.2,
            "max_length": 64,
            "prenorm": True,
            "too_long": "drop",
            "label_smoothing": 0.1,
            "steps": 2000,
            "batch_size": 2048,
            "learning_rate": 2e-3,
            "warmup": 200,
        },
        "base": {**_PAPER, "learning_rate": (512 * 4000) ** -0.5},
        "big": {
            **TransformerConfig.PRESETS["big"],
            **_PAPER,
            "learning_rate": (1024 * 4000) ** -0.5,
            "steps": 300_000,
        },
    },
    "gpt": {
        "small": {
            "data": "shakespeare",
            "vocab_size": 512,
            "d_model": 128,
            "layers": 4,
            "heads": 4,
            "d_ff": 512,
            "dropout": 0.0,
            "max_length": 128,
            "steps": 3000,
            "batch_size": 2048,
            "learning_rate": 3e-3,
            "warmup": 100,
        },
        **{f"gpt2-{size}": {**changes, **_GPT_2} for size, changes in GPTConfig.PRESETS.items()},
    },
    "bert": {
        "small": {
            "data": "shakespeare",
            "vocab_size": 512,
            "d_model": 128,
            "layers": 4,
            "heads": 4,
            "d_ff": 512,
            "dropout": 0.0,
            "prenorm": True,
            "max_length": 64,
            "steps": 3000,
            "batch_size": 2048,
            "learning_rate": 2e-3,
            "warmup": 100,
        },
        **{size: {**changes, **_BERT} for size, changes in BERTConfig.PRESETS.items()},
    },
    "vit": {
        "small": {
            "data": "mnist-5k",
            "image_size": 28,
            "patch_size": 7,
            "channels": 1,
            "d_model": 64,
            "layers": 4,
            "heads": 4,
            "d_ff": 256,
            "dropout": 0.0,
            "shift": 2,
            "steps": 2000,
            "batch_size": 64,
            "learning_rate": 1e-3,
            "warmup": 100,
        },
        **{f"vit-{size}": {**changes, **_VIT} for size, changes in ViTConfig.PRESETS.items()},
    },
    "bert-classifier": {
        "small": {
            "data": "homeassistant-languages",
            "vocab_size": 2000,
            "d_model": 128,
            "layers": 2,
            "heads": 4,
            "d_ff": 512,
            "dropout": 0.1,
            "prenorm": True,
            "max_length": 96,
            "too_long": "drop",
            "steps": 3000,
            "batch_size": 2048,
            "learning_rate": 2e-3,
            "warmup": 100,
        },
        **{size: {**changes, **_FINE_TUNING} for size, changes in BERTConfig.PRESETS.items()},
    },
}


def fields(task: str) -> dict[str, "dataclasses.Field[Any]"]:
    """The fields that a training of this task has, by name: the model's, then the training's."""
    both = (*dataclasses.fields(CONFIGS[task]), *dataclasses.fields(TrainConfig))
    return {field.name: field for field in both}


def resolve(
    task: str, preset: str, changes: Mapping[str, Any]
) -> "tuple[ModelConfig, TrainConfig, str | None]":
    """The model's configuration, the training's, and the preset's data set, None if it has none.

    Raises:
        ValueError: there is no such task, preset or field, or a value does not fit.
    """
    if task not in PRESETS:
        raise ValueError(f"task must be one of {', '.join(PRESETS)}; got {task!r}")
    if preset not in PRESETS[task]:
        known = ", ".join(PRESETS[task])
        raise ValueError(f"{task} has no preset {preset!r}; it has {known}")
    values = {**PRESETS[task][preset], **_checked(task, changes)}
    data = values.pop("data", None)
    ours = {field.name for field in dataclasses.fields(TrainConfig)}
    model = CONFIGS[task](**{name: v for name, v in values.items() if name not in ours})
    return model, TrainConfig(**{name: v for name, v in values.items() if name in ours}), data


def parse(task: str, settings: Iterable[str]) -> dict[str, Any]:
    """Fields and values from texts "field=value".

    Raises:
        ValueError: one is something else, the field does not exist or the value is of another type.
    """
    found = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set wants field=value; got {setting!r}")
        if name in fields(task):
            for kind in _types(task, name):
                try:
                    found[name] = _READ[kind](text)
                    break
                except (ValueError, KeyError):
                    continue
            else:
                raise ValueError(f"{name} must be {_names(task, name)}; got {text!r}")
        else:
            found[name] = text
    return _checked(task, found)


_READ: dict[type, Callable[[str], Any]] = {
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    int: int,
    float: float,
    str: str,
    types.NoneType: lambda text: {"none": None}[text.lower()],
}


def _types(task: str, name: str) -> tuple[type, ...]:
    for config in (TrainConfig, CONFIGS[task]):
        hint = typing.get_type_hints(config).get(name)
        if hint is not None:
            return typing.get_args(hint) or (hint,)
    raise KeyError(name)


def _names(task: str, name: str) -> str:
    words = {bool: "true or false", int: "an int", float: "a number", types.NoneType: "none"}
    return " or ".join(words[kind] for kind in _types(task, name))


def _checked(task: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes, whose fields exist and whose values are of their types."""
    known = fields(task)
    for name, value in changes.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"{task} has no field {name!r}{hint} (`fusedformer train {task} --help` lists them)"
            )
        allowed = _types(task, name)
        if type(value) not in allowed and not (type(value) is int and float in allowed):
            raise ValueError(f"{name} must be {_names(task, name)}; got {value!r}")
    return dict(changes)
