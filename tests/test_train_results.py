"""The figures on training in README and docs/train.md are those of the result file."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNS = json.loads((ROOT / "benchmarks/results/train-cpu.json").read_text())["runs"]
README, PAGE = ((ROOT / name).read_text() for name in ("README.md", "docs/train.md"))

# A row of README's table: the task, the figure, its baseline, the form of both.
TABLE = {
    "translator, Korean to English: chrF": ("seq2seq", "chrF", "chrF of copying the source", ".1f"),
    "the same: nats a token": (
        "seq2seq", "cross-entropy", "cross-entropy of a bigram model", ".2f",
    ),
    "text, Shakespeare: bits a byte": (
        "gpt", "bits per byte", "bits per byte of a trigram model", ".2f",
    ),
    "masked tokens, Shakespeare: accuracy": (
        "bert", "masked accuracy", "masked accuracy of the commonest token", ".1%",
    ),
    "digits, MNIST: accuracy": ("vit", "accuracy", "accuracy of the commonest class", ".1%"),
    "the language of a text, of 13: accuracy": (
        "bert-classifier", "accuracy", "accuracy of naive Bayes", ".1%",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", TABLE)
def test_readme(row):
    task, reached, baseline, form = TABLE[row]
    report = RUNS[task]["report"]
    assert f"| {row} | {report[reached]:{form}} | {report[baseline]:{form}}" in README


@pytest.mark.parametrize("task", RUNS)
def test_page(task):
    """Every line of what the run printed, and its curve."""
    for name, value in RUNS[task]["report"].items():
        assert re.search(rf"^{name}  +{value:.3f}$", PAGE, re.MULTILINE), name
    assert f"(pictures/train-{task}.png)" in PAGE
    assert (ROOT / f"docs/pictures/train-{task}.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_aimed_at():
    """Beyond simple baselines, on data held out."""
    translator, text, masked, digits = (
        RUNS[task]["report"] for task in ("seq2seq", "gpt", "bert", "vit")
    )
    assert translator["chrF"] >= 2 * translator["chrF of copying the source"]
    assert translator["cross-entropy"] < translator["cross-entropy of a bigram model"]
    assert text["bits per byte"] < text["bits per byte of a trigram model"]
    accuracy = masked["masked accuracy"]
    assert accuracy >= 3 * masked["masked accuracy of the commonest token"]
    assert digits["accuracy"] >= 0.9
    for run in RUNS.values():
        losses = [loss for _, loss in run["curves"]["held_out_loss"]]
        assert losses[-1] < losses[0]
