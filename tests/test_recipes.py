"""The pages on other people's models and on many devices: their code runs as it stands there."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from backends import BACKENDS

DOCS = Path(__file__).resolve().parent.parent / "docs"

pytestmark = pytest.mark.slow


def blocks(page):
    """(language, text) of each block of code."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="there is no C++ library here")
def test_drop_in_prints_what_it_says():
    pytest.importorskip("transformers")
    pytest.importorskip("x_transformers")
    names, printed, said = {}, "", 0
    for language, text in blocks("drop-in.md"):
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(text, names)
            printed = out.getvalue()
        else:
            said += 1
            assert printed == text
    assert said == 3


def test_parallel_runs_on_two_processes(tmp_path):
    program = tmp_path / "program.py"
    parts = [text for language, text in blocks("parallel.md") if language == "python"]
    program.write_text("".join(parts))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    run = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr
