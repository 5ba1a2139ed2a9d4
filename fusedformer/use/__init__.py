"""The commands that use a checkpoint, and what they share."""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusedformer.transformer import checkpoint


class Loaded(NamedTuple):
    """A checkpoint, ready to be used."""

    model: Any
    tokenizer: Any  # None for images
    about: dict[str, Any]  # what its config.json says


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The argument CHECKPOINT, and where the model runs."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run of `fusedformer train`"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1; default: a GPU if there is one")


def add_texts(parser: argparse.ArgumentParser, what: str) -> None:
    """The arguments TEXT, and --json."""
    parser.add_argument("texts", metavar="TEXT", nargs="+", help=f"{what}; - is standard input")
    parser.add_argument("--json", action="store_true", help="a JSON object for each, one a line")


def load(args: argparse.Namespace, *kinds: type) -> Loaded:
    """The checkpoint that was named, on its device.

    Raises:
        ValueError: there is none, its model is of none of the kinds, or it lacks its tokenizer.
    """
    path = args.checkpoint
    if not Path(path).is_dir():
        raise ValueError(f"there is no folder {path}; CHECKPOINT is one that training wrote")
    about = checkpoint.read_config(path)
    kind, _ = checkpoint.MODELS[about["model"]]
    if kind not in kinds:
        wanted = " or ".join(one.__name__ for one in kinds)
        raise ValueError(f"{path} holds a {kind.__name__}; this command wants a {wanted}")
    model, tokenizer = checkpoint.load(path)
    if tokenizer is None and about["model"] != "vit":
        raise ValueError(f"{path} has no tokenizer.json, without which no text can be read")
    return Loaded(model.to(_device(args.device)), tokenizer, about)


def _device(name: "str | None") -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from None


def texts(args: argparse.Namespace, lines: bool = True) -> list[str]:
    """Those of the command line; for "-" each line of standard input, or all of it as one.

    Raises:
        ValueError: one is empty.
    """
    given = args.texts
    if given == ["-"]:
        read = sys.stdin.read()
        given = read.splitlines() if lines else [read.removesuffix("\n")]
    for number, text in enumerate(given or [""], start=1):
        if not text.strip():
            raise ValueError("the text is empty" if len(given) < 2 else f"text {number} is empty")
    return given


def check_room(count: int, model: Any, what: str) -> None:
    """Raises ValueError where a text has more tokens than the model has positions."""
    if count > model.config.max_length:
        raise ValueError(
            f"{what} has {count} tokens; the model has {model.config.max_length} positions"
        )
