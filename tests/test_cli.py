"""The command line: exit codes, one sentence for a user's error, doctor's two outputs."""

import argparse
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import fusedformer
from fusedformer import cli, doctor
from fusedformer.kernels import dispatch

ROOT = Path(__file__).resolve().parent.parent


def python(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_as_a_module():
    version = python("-m", "fusedformer", "--version")
    assert version == f"fusedformer {fusedformer.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["doctor", "--no-such-option"]])
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: fusedformer" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: fusedformer {command}" in capsys.readouterr().out


def test_commands_are_imported_only_when_called():
    code = "import sys, fusedformer.cli as c; c.main(['doctor']); print(*sys.modules, sep='\\n')"
    modules = python("-c", code).splitlines()
    assert "fusedformer.doctor" in modules
    assert "fusedformer.benchmarks.profile" not in modules
    assert "matplotlib" not in modules


@pytest.fixture
def command(monkeypatch):
    """A subcommand "try" whose run() raises what the test sets, or returns it."""

    def result(outcome):
        def run(args: argparse.Namespace) -> int:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        module = types.ModuleType("fusedformer_try")
        module.configure, module.run = lambda parser: None, run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "try", (module.__name__, "for a test"))
        return cli.main(["try"])

    return result


@pytest.mark.parametrize("code", [0, 1])
def test_exit_code_is_that_of_run(command, code):
    assert command(code) == code


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError])
def test_user_error_is_one_sentence(command, capsys, error):
    assert command(error("--seq must be positive; got -1")) == 2
    assert capsys.readouterr().err == "fusedformer try: --seq must be positive; got -1\n"


def test_interrupted(command, capsys):
    assert command(KeyboardInterrupt()) == 130
    assert "interrupted" in capsys.readouterr().err


def test_our_own_errors_keep_their_traceback(command):
    with pytest.raises(KeyError):
        command(KeyError("a bug"))


# --- doctor ---------------------------------------------------------------------------------------


def test_doctor_json(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema_version"] == doctor.SCHEMA_VERSION
    assert report["versions"]["fusedformer"] == fusedformer.__version__
    assert report["devices"][0]["name"] == "cpu"
    rows = {(row["op"], row["device"]): row for row in report["ops"]}
    assert rows.keys() == {(op, d["name"]) for op in dispatch.OPS for d in report["devices"]}
    for row in rows.values():
        assert row["backends"].keys() == dispatch.BACKENDS.keys()
        assert row["backends"][row["automatic"]]["runs"]
        for backend in row["backends"].values():
            assert backend["runs"] == (backend["reason"] is None)


def test_doctor_gives_each_reason_and_failed_import(monkeypatch, capsys):
    """A backend whose module does not import: the reason in its line, one traceback below."""
    monkeypatch.setitem(dispatch.BACKENDS, "broken", "fusedformer.no_such_module")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for op in dispatch.OPS:
        assert re.search(rf"^  +(\w+, )*{op}(,|$)", out, re.MULTILINE)
    failed = re.search(r"^import of broken failed, for ([^:]+):\nTraceback", out, re.MULTILINE)
    assert re.split(r",\s+", failed[1]) == list(dispatch.OPS)
    assert out.count("Traceback") == 1
    assert "      not on broken: it cannot be imported (ModuleNotFoundError: No module" in out
    assert "ModuleNotFoundError: No module named 'fusedformer.no_such_module'\n" in out
