"""Puts finished runs of ``fusedformer train`` into the repository: figures, and curves.

    python tools/collect_training.py translator shakespeare masked digits languages

Each argument is a run's --out folder. benchmarks/results/train-cpu.json is written anew from all of
them, docs/pictures/train-TASK.png from each run's losses. README.md and docs/train.md quote both
(tests/test_train_results.py).
"""

import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
from PIL import Image

from fusedformer.benchmarks import document, environment
from fusedformer.transformer.train_log import draw_losses, read_metrics

ROOT = Path(__file__).resolve().parent.parent


def commit(folder: Path) -> str:
    """The newest commit when a run began."""
    before = f"--before={int((folder / 'run.json').stat().st_mtime)}"
    command = ["git", "rev-list", "-1", before, "HEAD"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout[:-1]


def result(folder: Path) -> dict:
    """What a run was asked for, what it reached, and its losses, [step, nats] each."""
    lines = read_metrics(folder / "metrics.jsonl")
    curves = {
        name: [[line["step"], round(line[name], 4)] for line in lines if name in line]
        for name in ("loss", "held_out_loss")
    }
    run = json.loads((folder / "run.json").read_text())
    report = json.loads((folder / "report.json").read_text())
    return {"commit": commit(folder), "run": run, "report": report, "curves": curves}


def picture(folder: Path, path: Path) -> None:
    """The run's loss.png, in few colours."""
    report = json.loads((folder / "report.json").read_text())
    baselines = {name: value for name, value in report.items() if "cross-entropy of" in name}
    draw_losses(folder, baselines)
    path.parent.mkdir(exist_ok=True)
    with Image.open(folder / "loss.png") as image:
        image.convert("RGB").quantize(32).save(path, optimize=True)


def main(folders: list[str]) -> None:
    about = environment.describe("cpu")
    # What may have changed since the runs is left out.
    about = {name: about[name] for name in ("device", "device_name", "torch", "cpu_capability")}
    about |= {"threads": torch.get_num_threads(), "commit": commit(Path(folders[0]))}
    found = {
        "schema_version": document.SCHEMA_VERSION,
        "kind": "train",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "state": document.COMPLETE,
        "environment": about,
        "runs": {},
    }
    for folder in map(Path, folders):
        one = result(folder)
        task = one["run"]["task"]
        found["runs"][task] = one
        picture(folder, ROOT / "docs" / "pictures" / f"train-{task}.png")
    path = ROOT / "benchmarks" / "results" / "train-cpu.json"
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
