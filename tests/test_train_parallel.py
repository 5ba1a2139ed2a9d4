"""torchrun with two processes over gloo: the losses and weights of one process."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fusedformer.cli import main
from fusedformer.transformer import checkpoint

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="this torch has no gloo",
    ),
]

FIELDS = [
    *("vocab_size=280", "max_length=16", "d_model=16", "layers=2", "heads=2", "d_ff=32"),
    *("dropout=0.1", "batch_size=64", "warmup=2", "schedule=constant"),
    *("log_every=2", "evaluate_every=2", "save_every=2"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    draw = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 105, (3000,), generator=draw).tolist()
    path.write_text("".join(map(chr, letters)))
    return path


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """One process that takes two batches a step: those that two processes take together."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    command = ["train", "gpt", "--data", str(text), "--out", str(folder)]
    assert main([*command, "--set", *FIELDS, "steps=6", "accumulate=2"]) == 0
    return folder


def torchrun(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", "-m", "fusedformer", "train", "gpt", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line.get("loss", line.get("held_out_loss")) for line in lines]


def assert_like(folder, other):
    """Sums are made in another order, and Adam passes a rounding on where gradients are small."""
    assert losses(folder) == pytest.approx(losses(other), rel=1e-5)
    ours, theirs = (checkpoint.load(run)[0].state_dict() for run in (folder, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one(parallel, text, alone, tmp_path):
    out = tmp_path / "run"
    command = ["--data", str(text), "--out", str(out), "--parallel", parallel]
    done = torchrun(*command, "--set", *FIELDS, "steps=4")
    # Only the first process speaks.
    assert done.stdout.count("bits per byte of a trigram model") == 1
    assert done.stderr.count("[4/4] loss") == 1
    # Its checkpoint holds whole tensors, which the other way of sharing can go on with.
    other = {"ddp": "fsdp", "fsdp": "ddp"}[parallel]
    torchrun("--out", str(out), "--resume", "--parallel", other, "--set", "steps=6")
    assert_like(out, alone)
