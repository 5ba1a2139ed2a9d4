"""The scripts of examples/, run as scripts, at small sizes."""

import copy
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from bounds import assert_within_bound

from fusedformer import GPT, GPTConfig
from fusedformer.kernels import dispatch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example in this process; returns what it prints."""

    def script(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def test_every_example_is_run_by_a_test():
    texts = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    for path in EXAMPLES.glob("*.py"):
        assert any(path.name in text for text in texts), path.name


def test_attention_in_your_layer(run):
    out = run("attention_in_your_layer.py", "--length", 40)
    assert float(re.search(r"norm (\S+)", out)[1]) > 0
    assert "difference from the formula" in out
    example = runpy.run_path(str(EXAMPLES / "attention_in_your_layer.py"))
    layer, x = example["CausalSelfAttention"](32, 4, dropout=0.5).eval(), torch.randn(2, 40, 32)
    truth = example["by_hand"](copy.deepcopy(layer).double(), x.double())
    assert_within_bound("output", layer(x), example["by_hand"](layer, x), truth)


def test_same_dropout(run):
    out = run("same_dropout.py")
    assert "False" not in out
    assert out.count("True") == 3
    reasons = {backend for backend in dispatch.BACKENDS if f"{backend}: not here" in out}
    compared = set(re.search(r"masks equal on (.*):", out)[1].split(", "))
    assert compared == dispatch.BACKENDS.keys() - reasons
    kept, of = map(int, re.search(r"reference: (\d+) of (\d+) elements", out).groups())
    assert abs(kept / of - 0.9) < 4 * (0.09 / of) ** 0.5  # four standard errors


def test_train_gpt(run, tmp_path):
    (tmp_path / "text.txt").write_text("a quick brown fox jumps over the lazy dog. " * 20)
    out = run("train_gpt.py", tmp_path / "text.txt", "--steps", 50, "--length", 32, "--width", 32)
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", out)]
    assert losses[-1] < 0.8 * losses[0]
    assert out.splitlines()[-1].startswith("a quick ")
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(SystemExit) as stop:
        run("train_gpt.py", tmp_path / "short.txt")
    assert stop.value.code == 2


def test_copy_task(run):
    out = run("copy_task.py", "--steps", 3, "--longest", 3)
    assert re.search(r"\d+ of 200 new sequences", out)


@pytest.mark.slow
def test_copy_task_is_learned(run):
    assert "200 of 200 new sequences without a fault" in run("copy_task.py", "--reverse")


def test_look_at_attention(run, tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    from fusedformer.transformer import checkpoint, data

    torch.manual_seed(0)
    tokenizer = data.train_tokenizer(["the cat sat on the mat"] * 3, 300)
    sizes = {"vocab_size": 300, "max_length": 24, "d_model": 32, "layers": 2, "heads": 4}
    checkpoint.save(tmp_path / "gpt", GPT(GPTConfig(**sizes, d_ff=64)), tokenizer)
    lines = run("look_at_attention.py", tmp_path / "gpt", "the cat").splitlines()
    assert len(lines) == 2 * 4
    assert all("<sos> → <sos> 100%" in line for line in lines)
