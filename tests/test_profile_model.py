"""Profiles of a model by its parts, and of recurrent models beside the Transformer."""

import json
import re

import pytest
import torch

from fusedformer import cli
from fusedformer.benchmarks import (
    document,
    model_parts,
    profile_model,
    profile_model_page,
    profile_recurrent,
    recurrent,
    trace,
)
from fusedformer.benchmarks.ops.models import Case
from fusedformer.transformer import train_flops

TINY = Case(2, 16, 2, 32, 2, 64)

# --- A model by its parts -------------------------------------------------------------------------


def test_parts_are_those_of_the_model():
    """Their operations add up to what the model's own count says, causal attention once more.

    That one counts half of attention's products, forward and twice that backward; here the whole
    square is in 3.5 forwards' worth, halved.
    """
    held = model_parts.parts(TINY)
    ours = sum(part.flops * part.count for part in held.values())
    attention = held[model_parts.ATTENTION]
    halves = 3 * 2 * TINY.batch * TINY.seq * TINY.seq * TINY.width  # per layer, as theirs
    wanted = train_flops.gpt(TINY.gpt(), TINY.batch, TINY.seq)
    assert ours - attention.flops * attention.count + halves * TINY.layers == pytest.approx(wanted)


def test_every_part_gives_gradients():
    for name, part in model_parts.parts(TINY).items():
        grads = part.call()
        assert all(torch.isfinite(grad).all() for grad in grads), name
        assert any(grad.abs().sum() > 0 for grad in grads), name


def test_times_of_parts():
    found = model_parts.times(TINY, 0.01, 3)
    assert set(found) == {*model_parts.parts(TINY), model_parts.WHOLE}
    assert all(len(held["ms"]) == 3 for held in found.values())
    assert found["norms, dropout, residuals"]["count"] == 2 * TINY.layers + 1


def rows(*lengths):
    """Attention as N^2 / 64, the feed-forward as N: they meet at 64."""
    for n in lengths:
        costs = {"attention": n * n / 64, "feed-forward": n, model_parts.WHOLE: n * n / 64 + 2 * n}
        parts = {name: {"ms": {"median": ms}, "count": 1, "flops": 0} for name, ms in costs.items()}
        yield {"seq": n, "status": "ok", "reason": "", "parts": parts}


def test_the_quadratic_part_takes_over():
    found = profile_model.laws(list(rows(16, 32, 128, 256, 512)))
    exponents = {law["part"]: law["exponent"] for law in found["fits"]}
    assert exponents["attention"] == pytest.approx(2.0)
    assert exponents["feed-forward"] == pytest.approx(1.0)
    assert found["crossing"]["x"] == pytest.approx(64)
    assert profile_model_page.reading(found) == (
        "Attention takes longer than the feed-forward layers from N = 64 on."
    )


@pytest.mark.parametrize(
    ("lengths", "said"), [((16, 32), "less"), ((128, 256), "longer"), ((16,), "Too few")]
)
def test_reading(lengths, said):
    assert said in profile_model_page.reading(profile_model.laws(list(rows(*lengths))))


def test_model_command(tmp_path, capsys):
    argv = ["profile", "model", "--device=cpu", "--seq=8,16", "--layers=1", "--width=16"]
    argv += ["--heads=2", "--vocab=32", "--seconds=0.01", f"--out={tmp_path}"]
    assert cli.main([*argv, f"--trace={tmp_path / 'trace.json'}"]) == 0
    data = document.read(tmp_path / "model.json", "profile model")
    assert [row["seq"] for row in data["rows"]] == [8, 16]
    assert all(row["status"] == "ok" for row in data["rows"])
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    html = (tmp_path / "model.html").read_text()
    assert not re.search(r"<script|src=|https?://(?!www\.w3\.org/)", html)
    assert "no Proton trace" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "said"),
    [("--width=10", "--width got 10"), ("--dropout=1", "--dropout got '1'"), ("--seq=a", "--seq")],
)
def test_a_wrong_option(option, said, capsys):
    assert cli.main(["profile", "model", "--device=cpu", "--heads=4", option]) == cli.USER_ERROR
    assert said in capsys.readouterr().err


def test_trace_of_a_call(tmp_path):
    x = torch.randn(8, 8)
    said = trace.write(tmp_path / "a.json", lambda: x @ x, "cpu")
    events = json.loads((tmp_path / "a.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    assert "no Proton trace" in said[1]


# --- Recurrent models -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", recurrent.MODELS)
def test_models_have_one_interface(name):
    net = recurrent.model(name, 16, 8, "cpu")
    source, target = (torch.randint(1, recurrent.VOCAB, (3, n)) for n in (8, 5))
    assert net(source, target).shape == (3, 5, recurrent.VOCAB)


def test_only_attention_sees_every_state():
    """Of the context vector's encoder the last state alone counts, of the others all."""
    source, target = (torch.randint(1, recurrent.VOCAB, (2, 6)) for _ in range(2))
    net = recurrent.model("context vector", 16, 6, "cpu")
    _, context = net.encoder(net.embedding(source))
    states, _ = net.decoder(net.embedding(target), context)
    torch.testing.assert_close(net(source, target), net.output(states))


def test_gradient_over_a_distance():
    """It vanishes through a recurrence, and does not where attention reaches back."""
    left = {
        name: [recurrent.recall(name, n, 16, 0, 16, "cpu")["gradient"] for n in (4, 32)]
        for name in recurrent.MODELS
    }
    assert left["context vector"][1] < 1e-3 * left["context vector"][0]
    assert left["transformer"][1] > 0.1
    assert left["recurrent attention"][1] > left["context vector"][1]


def test_recall_is_learnt():
    """Sixteen symbols over four tokens of noise; guessing is right once in sixteen."""
    assert recurrent.recall("transformer", 4, 32, 80, 32, "cpu")["accuracy"] > 0.9
    assert recurrent.recall("transformer", 4, 32, 0, 32, "cpu")["accuracy"] < 0.3


def test_sequential_steps():
    assert recurrent.sequential_steps("context vector", 100) == 200
    assert recurrent.sequential_steps("transformer", 100) == 2


def test_recurrent_command(tmp_path):
    argv = ["profile", "recurrent", "--device=cpu", "--seq=4", "--distances=2", "--steps=2"]
    argv += ["--width=8", "--batch=4", "--seconds=0.01", f"--out={tmp_path}"]
    assert cli.main(argv) == 0
    data = document.read(tmp_path / "recurrent.json", "profile recurrent")
    assert {row["status"] for row in data["times"] + data["recall"]} == {"ok"}
    assert len(data["times"]) == len(recurrent.MODELS)
    tables = profile_recurrent.tables(data)
    assert len(tables) == 2
    html = (tmp_path / "recurrent.html").read_text()
    assert not re.search(r"<script|src=|https?://(?!www\.w3\.org/)", html)
