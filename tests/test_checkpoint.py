"""Checkpoints: the same model back, whole folders or none, clear words for what does not fit."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from fusedformer.transformer import checkpoint, data
from fusedformer.transformer.bert import BERT, BERTConfig
from fusedformer.transformer.gpt import GPT, GPTConfig
from fusedformer.transformer.seq2seq import Transformer, TransformerConfig
from fusedformer.transformer.vit import ViT, ViTConfig

pytest.importorskip("safetensors")

SMALL = {"d_model": 16, "layers": 2, "heads": 2, "d_ff": 32}
MODELS = [
    Transformer(TransformerConfig(vocab_size=20, share_embeddings=False, **SMALL)),
    GPT(GPTConfig(vocab_size=20, max_length=8, share_layers=True, **SMALL)),
    BERT(BERTConfig(vocab_size=20, max_length=8, **SMALL)),
    ViT(ViTConfig(image_size=8, patch_size=4, classes=3, **SMALL)),
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_round_trip(model, tmp_path):
    folder = checkpoint.save(tmp_path / "saved", model, about={"labels": ["a", "b"]})
    loaded, tokenizer = checkpoint.load(folder)
    assert tokenizer is None
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert not loaded.training
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    about = checkpoint.read_config(folder)
    assert about["labels"] == ["a", "b"]
    assert about["rng_version"] == 1
    with pytest.raises(ValueError, match="no training state"):
        checkpoint.read_state(folder)


def test_tokenizer_is_beside_it(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = data.train_tokenizer(["some text"], 262)
    checkpoint.save(tmp_path / "saved", MODELS[1], tokenizer)
    _, loaded = checkpoint.load(tmp_path / "saved")
    assert loaded.to_str() == tokenizer.to_str()


def test_nothing_is_overwritten(tmp_path):
    checkpoint.save(tmp_path / "saved", MODELS[1])
    with pytest.raises(FileExistsError, match="exists already"):
        checkpoint.save(tmp_path / "saved", MODELS[2])
    assert isinstance(checkpoint.load(tmp_path / "saved")[0], GPT)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_others_may_read_all_files_alike(tmp_path):
    folder = checkpoint.save(tmp_path / "saved", MODELS[1])
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_runs_newest_checkpoint(tmp_path):
    for step in (5, 100, 20):
        checkpoint.save(checkpoint.step_folder(tmp_path, step), MODELS[1])
    (tmp_path / ".step-00000200.unfinished").mkdir()
    assert checkpoint.find(tmp_path).name == "step-00000100"
    assert checkpoint.find(tmp_path / "step-00000005").name == "step-00000005"
    checkpoint.load(tmp_path)
    checkpoint.keep_newest(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000100"]


# --- What does not fit ----------------------------------------------------------------------------


def test_no_checkpoint(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="is no checkpoint"):
            checkpoint.load(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"d_model": 32}, r"token_embedding.weight in shape \(20, 16\); this GPT wants \(20, 32\)"),
        ({"layers": 3, "share_layers": False}, r"has no stack.layers.1.*which this GPT has"),
        ({"rotary": True}, "has position_embedding.weight, which this GPT has not"),
        ({"heads": 3}, "d_model must be a multiple of heads"),
        ({"colour": 3}, "colour"),
    ],
)
def test_another_shape(tmp_path, change, says):
    folder = checkpoint.save(tmp_path / "saved", MODELS[1])
    about = json.loads((folder / "config.json").read_text())
    about["config"] |= change
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=says):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", b"{", "config.json is no JSON"),
        ("config.json", b"[]", "must hold a JSON object"),
        ("config.json", b'{"model": "lstm", "config": {}}', "of no model of this package"),
        ("model.safetensors", b"\x08\x00", "model.safetensors is damaged"),
        ("model.safetensors", None, "model.safetensors is missing"),
    ],
)
def test_damaged(tmp_path, file, content, says):
    folder = checkpoint.save(tmp_path / "saved", MODELS[1])
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        checkpoint.load(folder)


# --- A kill in the middle -------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from fusedformer.transformer import checkpoint
from fusedformer.transformer.gpt import GPT, GPTConfig

run, moment = Path(sys.argv[1]), sys.argv[2]
model = GPT(GPTConfig(vocab_size=20, max_length=8, d_model=16, layers=2, heads=2, d_ff=32))
checkpoint.save(checkpoint.step_folder(run, 1), model)

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "weights":
    checkpoint.safetensors().save_file = kill
elif moment == "flush":
    checkpoint._flush = kill
elif moment == "rename":
    Path.rename = kill
elif moment == "delete":
    checkpoint.shutil.rmtree = lambda path, **options: ".deleted" in path.name and kill()
checkpoint.save(checkpoint.step_folder(run, 2), model)
checkpoint.keep_newest(run, 1)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("moment", ["weights", "flush", "rename", "delete"])
def test_killed_while_saving(tmp_path, moment):
    """Whenever the process ends, what is there under its own name is whole."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), moment]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = checkpoint.steps(tmp_path)
    assert [path.name for path in left] == ["step-0000000" + ("2" if moment == "delete" else "1")]
    checkpoint.load(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    # The next save clears up.
    checkpoint.save(checkpoint.step_folder(tmp_path, 3), MODELS[1])
    checkpoint.keep_newest(tmp_path, 2)
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoint.find(tmp_path).name == "step-00000003"
