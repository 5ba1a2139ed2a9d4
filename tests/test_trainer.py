"""The loop of training: its schedule and optimizer, and resuming that changes nothing."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from fusedformer.transformer import checkpoint, train_log
from fusedformer.transformer.gpt import GPT, GPTConfig
from fusedformer.transformer.presets import TrainConfig
from fusedformer.transformer.train_tasks import NextToken
from fusedformer.transformer.trainer import Trainer, adamw, learning_rate

pytest.importorskip("safetensors")

MODEL = GPTConfig(
    vocab_size=20, max_length=8, d_model=16, layers=2, heads=2, d_ff=32, dropout=0.1
)
CONFIG = TrainConfig(
    steps=12, batch_size=32, warmup=3, learning_rate=1e-2, log_every=3, evaluate_every=6,
    save_every=4, keep=10,
)  # fmt: skip


def text(count, seed):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 20, (count,), generator=draw).tolist()]


def trainer(folder, config=CONFIG, model=MODEL, seed=0):
    torch.manual_seed(seed)
    task = NextToken(model, text(200, 0), text(50, 1), config.batch_size, config.seed)
    return Trainer(GPT(model), task, config, folder)


def changed(**fields):
    return dataclasses.replace(CONFIG, **fields)


TIMED = ("tokens_per_second", "utilisation")


def metrics(folder):
    """All of metrics.jsonl that does not depend on the clock."""
    lines = train_log.read_metrics(folder / "metrics.jsonl")
    return [{name: v for name, v in line.items() if name not in TIMED} for line in lines]


def losses(folder):
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def weights(folder, step):
    return checkpoint.read_tensors(checkpoint.step_folder(folder, step) / "model.safetensors")


def assert_same_run(folder, other, step=12):
    assert metrics(folder) == metrics(other)
    ours, theirs = weights(folder, step), weights(other, step)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer(folder).run()
    return folder


# --- Schedule and optimizer -----------------------------------------------------------------------


def test_schedules():
    paper = TrainConfig(
        schedule="inverse_sqrt", warmup=4000, learning_rate=(512 * 4000) ** -0.5, steps=100_000
    )
    for step in (1, 100, 3999, 4000, 4001, 100_000):
        # Section 5.3 of Vaswani et al. 2017.
        expected = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
        assert learning_rate(paper, step) == pytest.approx(expected, rel=1e-12)
    cosine = TrainConfig(warmup=10, steps=110, learning_rate=2.0, final_rate=0.1)
    values = [learning_rate(cosine, step) for step in range(1, 111)]
    assert values[0] == pytest.approx(0.2)
    assert max(values) == values[9] == 2
    assert values[59] == pytest.approx(0.2 + 1.8 / 2)
    assert values[109] == pytest.approx(0.2)
    assert learning_rate(TrainConfig(schedule="constant", warmup=0, learning_rate=3.0), 1) == 3


def test_only_matrices_decay():
    model = GPT(MODEL)
    groups = adamw(model, CONFIG).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "bias" in name or "norm" in name else 0.1), name


def test_gradient_is_clipped(tmp_path):
    run = trainer(tmp_path, changed(clip=1e-3))
    norms = []
    run.optimizer.register_step_pre_hook(
        lambda *_: norms.append(math.hypot(*(p.grad.norm() for p in run.model.parameters())))
    )
    run.train_step()
    assert norms == [pytest.approx(1e-3, rel=1e-4)]


def test_batches_of_a_step_weigh_as_many_as_their_terms(tmp_path):
    """Two batches of a step give the gradient of their union; these have 4 rows and 1."""
    config = changed(accumulate=2, clip=0.0)
    run = trainer(tmp_path, config, dataclasses.replace(MODEL, dropout=0.0))
    parts = [run.task.batch(0).inputs["tokens"], run.task.batch(1).inputs["tokens"][:1]]
    run.task.batch = lambda number: run.task._of(parts[number])
    run.task.terms = lambda number: parts[number][:, 1:].numel()
    seen = []
    run.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in run.model.parameters())
    )
    run.train_step()
    whole = trainer(tmp_path, config, dataclasses.replace(MODEL, dropout=0.0)).model
    whole.loss(torch.cat(parts)).backward()
    for ours, parameter in zip(seen, whole.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)
    assert run.position == 2


def test_recomputed_activations_are_the_same(tmp_path, whole_run):
    """Dropout masks included."""
    trainer(tmp_path, changed(checkpoint_activations=True)).run()
    assert_same_run(tmp_path, whole_run)


@pytest.mark.slow
def test_compiled(tmp_path, fresh_compiler):
    """Without dropout, whose seeds a compiled function draws in another way."""
    model = dataclasses.replace(MODEL, dropout=0.0, layers=1)
    for name in (True, False):
        trainer(tmp_path / str(name), changed(compile=name, steps=6), model).run()
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-5)


def test_bfloat16(tmp_path, whole_run):
    trainer(tmp_path, changed(dtype="bfloat16")).run()
    ours, theirs = losses(tmp_path), losses(whole_run)
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=2**-7)  # an ulp of bfloat16


# --- Resuming -------------------------------------------------------------------------------------


def test_what_a_run_leaves(whole_run):
    assert [path.name for path in checkpoint.steps(whole_run)] == [
        "step-00000004", "step-00000008", "step-00000012",
    ]  # fmt: skip
    lines = metrics(whole_run)
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [6, 12]


@pytest.mark.parametrize("until", [4, 5, 6])
def test_resumed_is_uninterrupted(tmp_path, whole_run, until):
    """Stopped after any step, with or without a checkpoint there, or a half window of metrics."""
    first = trainer(tmp_path)
    steps, train_step = 0, first.train_step

    def stop_after():
        nonlocal steps
        if steps == until:
            raise RuntimeError("power cut")
        train_step()
        steps += 1

    first.train_step = stop_after
    with pytest.raises(RuntimeError):
        first.run()
    # Other random numbers were drawn since, and the model starts from other weights.
    trainer(tmp_path, seed=5).run()
    assert_same_run(tmp_path, whole_run)


def test_interrupted_saves_and_resumes(tmp_path, whole_run, capsys):
    first = trainer(tmp_path)
    train_step = first.train_step

    def interrupt():
        train_step()
        if first.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    first.train_step = interrupt
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell started it in the background
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert checkpoint.steps(tmp_path)[-1].name == "step-00000005"
    assert "interrupted after step 5, which is saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    trainer(tmp_path).run()
    assert_same_run(tmp_path, whole_run)


def test_oldest_checkpoints_go(tmp_path):
    trainer(tmp_path, changed(keep=1)).run()
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000012"]


def test_other_data_or_model(tmp_path, whole_run):
    other = trainer(whole_run)
    other._fingerprint = "other"
    with pytest.raises(ValueError, match="was trained on other data"):
        other.run()
    wide = trainer(whole_run, model=dataclasses.replace(MODEL, d_ff=64))
    with pytest.raises(ValueError, match=r"linear1.weight in shape \(32, 16\).*wants \(64, 16\)"):
        wide.run()
    assert len(checkpoint.steps(whole_run)) == 3


def test_loss_that_is_not_finite(tmp_path):
    with pytest.raises(ValueError, match=r"the loss is nan at step .*lower learning_rate"):
        trainer(tmp_path, changed(learning_rate=math.inf, warmup=0)).run()
    assert not checkpoint.steps(tmp_path)


KILLED = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[2])
    from pathlib import Path
    import test_trainer
    from fusedformer.transformer import checkpoint

    save_file = checkpoint.safetensors().save_file

    def kill_in_second(tensors, path):
        save_file(tensors, path)
        if "step-00000008" in str(path):
            path.write_bytes(path.read_bytes()[:100])
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.safetensors().save_file = kill_in_second
    test_trainer.trainer(Path(sys.argv[1])).run()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_while_saving_is_resumed_exactly(tmp_path, whole_run):
    """By another process, with other random numbers behind it."""
    code = textwrap.dedent(KILLED)
    command = [sys.executable, "-c", code, str(tmp_path), os.path.dirname(__file__)]
    # As many threads as here: how a sum is split among them shows in its last bit.
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000004"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 8})[:-3])
    trainer(tmp_path).run()
    assert_same_run(tmp_path, whole_run)
    assert not list(tmp_path.glob(".*"))
