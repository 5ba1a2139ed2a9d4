"""What `make` does before anything else: an environment that is right, finished, and ours."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("setup_venv", ROOT / "tools/setup_venv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pip_calls(tool, monkeypatch):
    """pip does nothing but write its arguments down; what it is to answer comes first."""
    calls, answers = [], []

    def pip(python, *args):
        calls.append(" ".join(args))
        return answers.pop(0) if answers else True

    monkeypatch.setattr(tool, "pip", pip)
    return calls, answers


def make(tool, monkeypatch, venv):
    monkeypatch.setattr(sys, "argv", ["setup_venv.py", str(venv)])
    return tool.main()


def state(venv):
    return json.loads((venv / "fusedformer-setup.json").read_text())["key"]


def test_torch_that_is_there_is_used(tool, monkeypatch, tmp_path, pip_calls):
    venv = tmp_path / "venv"
    assert make(tool, monkeypatch, venv) == 0
    assert state(venv) == tool.key()
    code = "import torch, fusedformer; print(torch.__file__, fusedformer.__file__)"
    done = subprocess.run(
        [venv / "bin/python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [torch.__file__, str(ROOT / "fusedformer/__init__.py")]
    # Whatever else is installed, pip is told to keep this torch.
    assert all(f"torch=={torch.__version__}" in call.split() for call in pip_calls[0])
    subprocess.run([venv / "bin/fusedformer", "--version"], cwd=tmp_path, check=True)

    def create(*args, **options):
        raise AssertionError("made twice")

    monkeypatch.setattr(tool, "create", create)
    assert make(tool, monkeypatch, venv) == 0


def test_interrupted_set_up_is_made_anew(tool, monkeypatch, tmp_path, pip_calls):
    venv = tmp_path / "venv"

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tool, "FIND_TORCH", "")  # so that there is something to install
        patch.setattr(tool, "install", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(tool, patch, venv)
    assert state(venv) != tool.key()
    (venv / "half-written").touch()
    assert make(tool, monkeypatch, venv) == 0
    assert state(venv) == tool.key()
    assert not (venv / "half-written").exists()


def test_folder_of_somebody_else_is_left_alone(tool, monkeypatch, tmp_path, capsys):
    (tmp_path / "pyvenv.cfg").write_text("theirs")
    assert make(tool, monkeypatch, tmp_path) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["pyvenv.cfg"]
    assert "VENV=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("system", "gpu", "failures", "expected"),
    [
        ("Linux", True, 0, ["torch==1"]),
        ("Darwin", False, 0, ["torch==1"]),
        ("Linux", False, 0, ["torch==1+cpu"]),
        ("Linux", False, 1, ["torch==1+cpu", "torch==1+cpu --extra-index-url"]),
        ("Linux", False, 2, ["torch==1+cpu", "torch==1+cpu --extra-index-url", "torch==1"]),
    ],
)
def test_which_torch_is_installed(tool, monkeypatch, pip_calls, system, gpu, failures, expected):
    calls, answers = pip_calls
    answers += [False] * failures
    monkeypatch.setattr(tool.platform, "system", lambda: system)
    monkeypatch.setattr(tool, "output", lambda *command: "GPU 0" if gpu else "")
    assert tool.install_torch("python", "torch==1")
    assert len(calls) == len(expected)
    assert all(call.startswith(start) for call, start in zip(calls, expected, strict=True))
