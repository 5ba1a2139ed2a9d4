"""Checkpoints: a folder with a model, its tokenizer and, to train on, the optimizer's state.

    model.safetensors             the parameters and buffers, by their names in state_dict()
    config.json                   {"model": "gpt", "config": {...}, "rng_version": 1, ...}
    tokenizer.json                for models of text
    training_state.safetensors    the optimizer's tensors   } only in those
    training_state.json           steps done and the like   } that training writes

A folder appears whole or not at all: it is written under another name, flushed to the disk, and
renamed. A process that is killed while it saves leaves the checkpoints that were there before.
"""

import dataclasses
import importlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fusedformer.kernels.rng import RNG_VERSION
from fusedformer.transformer import bert, gpt, seq2seq, vit
from fusedformer.transformer.config import ModelConfig
from fusedformer.transformer.data import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MODELS: dict[str, tuple[type[nn.Module], type[ModelConfig]]] = {
    "transformer": (seq2seq.Transformer, seq2seq.TransformerConfig),
    "gpt": (gpt.GPT, gpt.GPTConfig),
    "bert": (bert.BERT, bert.BERTConfig),
    "vit": (vit.ViT, vit.ViTConfig),
}


def safetensors() -> Any:
    """The library that weights are read and written with.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError:
        raise ValueError("checkpoints need safetensors (pip install safetensors)") from None


def save(
    folder: "str | Path",
    model: nn.Module,
    tokenizer: "Tokenizer | None" = None,
    about: "Mapping[str, Any] | None" = None,
) -> Path:
    """Writes a model that was not trained here, or is not to be trained on, as a checkpoint.

    Args:
        folder: does not exist yet.
        model: one of this package's.
        tokenizer: of a model of text.
        about: more for config.json.

    Raises:
        FileExistsError: ``folder`` exists.
    """
    return write(folder, model, model.state_dict(), tokenizer, about or {})


def write(
    folder: "str | Path",
    model: Any,
    weights: Mapping[str, Tensor],
    tokenizer: "Tokenizer | None",
    about: Mapping[str, Any],
    state: "tuple[Mapping[str, Tensor], Mapping[str, Any]] | None" = None,
) -> Path:
    """As save(), with weights that may be gathered from elsewhere and the training's state."""
    folder, library = Path(folder), safetensors()
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; it is not overwritten")
    name = next(name for name, (kind, _) in MODELS.items() if type(model) is kind)
    config: dict[str, Any] = {"model": name, "config": dataclasses.asdict(model.config)}
    config |= {"rng_version": RNG_VERSION, **about}
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    library.save_file(_plain(weights), unfinished / "model.safetensors")
    (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(str(unfinished / "tokenizer.json"))
    if state is not None:
        library.save_file(_plain(state[0]), unfinished / "training_state.safetensors")
        (unfinished / "training_state.json").write_text(json.dumps(state[1], indent=2) + "\n")
    for file in unfinished.iterdir():
        # safetensors lets no one but the owner read; whoever may read the rest may read these.
        shutil.copymode(unfinished / "config.json", file)
        _flush(file)
    _flush(unfinished)
    unfinished.rename(folder)
    _flush(folder.parent)
    return folder


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    file = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


# --- The checkpoints of a run ---------------------------------------------------------------------


def step_folder(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint after ``step`` steps."""
    return run / f"step-{step:08d}"


def steps(run: Path) -> list[Path]:
    """A run's checkpoints, the oldest first."""
    if not run.is_dir():
        return []
    return sorted(path for path in run.iterdir() if re.fullmatch(r"step-\d{8}", path.name))


def keep_newest(run: Path, count: int) -> None:
    """Deletes all of a run's checkpoints but the newest ``count``."""
    for folder in steps(run)[:-count]:
        # Renamed first: a half deleted folder is never taken for a checkpoint.
        doomed = folder.rename(folder.with_name(f".{folder.name}.deleted"))
        shutil.rmtree(doomed)
    for pattern in (".step-*.unfinished", ".step-*.deleted"):  # left over by a kill
        for folder in run.glob(pattern):
            shutil.rmtree(folder)


def find(path: "str | Path") -> Path:
    """The checkpoint that ``path`` means: itself, or the newest of a run.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    found = steps(path)
    if not found:
        raise ValueError(
            f"{path} is no checkpoint: it has neither a config.json nor folders step-..., as "
            "`fusedformer train --out` writes them"
        )
    return found[-1]


# --- Reading --------------------------------------------------------------------------------------


def load(path: "str | Path") -> "tuple[nn.Module, Tokenizer | None]":
    """The model, on the CPU and in eval mode, and its tokenizer, None for images.

    Args:
        path: a checkpoint, or the folder of a run, whose newest is taken.

    Raises:
        ValueError: there is no checkpoint, or it is damaged; the text is one sentence.
    """
    folder = find(path)
    about = read_config(folder)
    kind, config_type = MODELS[about["model"]]
    try:
        config = config_type(**about["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} does not fit: {error}") from None
    model = kind(config)
    model.load_state_dict(matching_weights(model, folder))
    tokenizer = folder / "tokenizer.json"
    return model.eval(), load_tokenizer(tokenizer) if tokenizer.is_file() else None


def read_config(path: "str | Path") -> dict[str, Any]:
    """What config.json says.

    Raises:
        ValueError: there is no checkpoint, or the file is none of ours.
    """
    file = find(path) / "config.json"
    about = read_json(file)
    if about.get("model") not in MODELS or not isinstance(about.get("config"), dict):
        raise ValueError(
            f'{file} is of no model of this package; it wants "model", one of '
            f'{", ".join(MODELS)}, and "config"'
        )
    return about


def matching_weights(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """A checkpoint's weights by name, for a model of the same shape.

    Raises:
        ValueError: the model is of another shape.
    """
    weights, kind = read_tensors(folder / "model.safetensors"), type(model).__name__
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if name not in weights:
            raise ValueError(f"{folder} has no {name}, which this {kind} has")
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"{folder} has {name} in shape {tuple(weights[name].shape)}; this {kind} wants "
                f"{tuple(tensor.shape)}"
            )
    if unknown := sorted(weights.keys() - wanted.keys()):
        raise ValueError(f"{folder} has {unknown[0]}, which this {kind} has not")
    return weights


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The training's state: tensors by name, and the rest.

    Raises:
        ValueError: the checkpoint has none.
    """
    if not (folder / "training_state.json").is_file():
        raise ValueError(f"{folder} has no training state; it can be used, but not trained on")
    return read_tensors(folder / "training_state.safetensors"), read_json(
        folder / "training_state.json"
    )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A safetensors file, on the CPU.

    Raises:
        ValueError: it is missing or damaged.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    library = safetensors()
    try:
        return library.load_file(file)
    except Exception as error:  # its own class derives from Exception alone
        raise ValueError(f"{file} is damaged: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: it holds something else; the text names it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object; got {type(content).__name__}")
    return content
