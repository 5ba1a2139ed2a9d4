"""Training in one call: from a preset and data to checkpoints and a report.

``train`` is what the command ``fusedformer train`` runs. The loop itself is in trainer.py, for a
model and a task of one's own.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusedformer.transformer import checkpoint
from fusedformer.transformer.presets import CHANGEABLE, TrainConfig, resolve
from fusedformer.transformer.train_log import draw_losses
from fusedformer.transformer.train_parallel import World
from fusedformer.transformer.train_report import report
from fusedformer.transformer.train_setup import set_up
from fusedformer.transformer.trainer import Trainer


def train(
    task: str,
    *,
    out: "str | Path",
    preset: "str | None" = None,
    data: "str | Path | None" = None,
    held_out: "str | Path | None" = None,
    start: "str | Path | None" = None,
    resume: bool = False,
    parallel: str = "ddp",
    say: Callable[[str], None] = print,
    **fields: Any,
) -> dict[str, float]:
    """Trains a model and reports what it has learned on held-out data.

    Args:
        task: "seq2seq", "gpt", "bert", "vit" or "bert-classifier".
        out: a folder for checkpoints, metrics.jsonl, loss.png and report.json.
        preset: of presets.PRESETS[task]; "small" by default.
        data: a TSV file of pairs or of classes and texts, a text file or folder of them, a folder
            of folders of images, or a name of datasets.DATASETS; the preset's by default.
        held_out: a file or folder like ``data``; by default a part of it (data.split_*).
        start: for a bert-classifier, the checkpoint of a BERT that it begins with, whose sizes and
            tokenizer it takes.
        resume: go on with the run in ``out``; the arguments above may then be left out.
        parallel: "ddp" or "fsdp", for processes that torchrun started.
        say: prints a line.
        fields: of the model's configuration and of TrainConfig, over the preset's.

    Returns:
        The report: name -> number, with baselines.

    Raises:
        ValueError: an argument, a field or the data is wrong, or ``out`` holds another run; the
            text is one sentence, and nothing was written.
        OSError: a file or a data set cannot be had.
        KeyboardInterrupt: interrupted; the state is saved, and ``resume`` goes on from it.
    """
    out = Path(out)
    asked = {"task": task, "preset": preset, "data": data, "held_out": held_out, "start": start}
    run = _resumed(out, asked, fields) if resume else _new(out, asked, fields)
    model_config, config, _ = resolve(run["task"], run["preset"], run["fields"])
    checkpoint.safetensors()  # rather than after hours
    with World(parallel) as world:
        # In a function of its own: DDP has to be gone before its processes part, or gloo may abort.
        return _train(run, model_config, config, out, world, say)


def _train(
    run: dict[str, Any],
    model_config: Any,
    config: TrainConfig,
    out: Path,
    world: World,
    say: Callable[[str], None],
) -> dict[str, float]:
    first = world.rank == 0
    tell = say if first else (lambda line: None)
    setup = set_up(run, model_config, config, out, world, tell)
    if first:
        out.mkdir(parents=True, exist_ok=True)
        (out / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    trainer = Trainer(setup.model, setup.task, config, out, setup.tokenizer, setup.about, world)
    trainer.run()
    found: dict[str, float] = {}
    if first:
        # As anyone would use it: from its checkpoint.
        model, tokenizer = checkpoint.load(out)
        found = report(model, setup.task, tokenizer, setup.held_out)
        (out / "report.json").write_text(json.dumps(found, indent=2) + "\n")
        lines = {name: value for name, value in found.items() if "cross-entropy of" in name}
        if not draw_losses(out, lines) and importlib.util.find_spec("matplotlib") is None:
            tell("no loss.png: matplotlib is not installed (pip install matplotlib)")
    return world.share(found)


# --- Which run ------------------------------------------------------------------------------------


def _new(out: Path, asked: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        hint = " (resume goes on with it)" if (out / "run.json").is_file() else ""
        raise ValueError(f"out must be a new or an empty folder; {out} holds something{hint}")
    preset = asked["preset"] or "small"
    _, _, own = resolve(asked["task"], preset, fields)
    source = asked["data"] or own
    if source is None:
        raise ValueError(f"the preset {preset} has no data of its own; data must name some")
    if asked["start"] is not None and asked["task"] != "bert-classifier":
        raise ValueError(f"start is for a bert-classifier; {asked['task']} begins at random")
    given = {name: asked[name] and str(asked[name]) for name in ("held_out", "start")}
    return {
        "task": asked["task"],
        "preset": preset,
        "data": str(source),
        **given,
        "fields": fields,
    }


def _resumed(out: Path, asked: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    file = out / "run.json"
    if not file.is_file():
        raise ValueError(f"{out} holds no run to resume; there is no run.json in it")
    run = checkpoint.read_json(file)
    if missing := {"task", "preset", "data", "fields"}.difference(run):
        raise ValueError(f"{file} is not as training wrote it: it has no {min(missing)}")
    for name, value in asked.items():
        if value is not None and str(value) != run.get(name):
            raise ValueError(f"{out} holds a run with {name} {run.get(name)}, not {value}")
    fixed = [name for name in fields if name not in CHANGEABLE]
    for name in fixed:
        model, training, _ = resolve(run["task"], run["preset"], run["fields"])
        before = getattr(training, name, getattr(model, name, None))
        if fields[name] != before:
            raise ValueError(
                f"{name} of the run in {out} is {before!r} and stays so; what can be changed is "
                f"{', '.join(CHANGEABLE)}"
            )
    return {**run, "fields": {**run["fields"], **fields}}
