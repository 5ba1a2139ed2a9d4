"""The kernel for the Hugging Face hub: loaded from its folder alone, and beside fusedformer."""

import json
import re
import subprocess
import sys

import pytest

from fusedformer.integrations.hub import BACKENDS, export

# Loads a build as the package kernels does, under the name in its metadata.
LOAD = """
import importlib.util, json, sys
from pathlib import Path
build = Path({build!r})
name = json.loads((build / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
"""

USE = """
import torch
x = torch.randn(1, 2, 5, 8, requires_grad=True)
kernel.attention(x, x, x, causal=True, dropout_p=0.1).sum().backward()
assert x.grad.isfinite().all()
norm = torch.nn.LayerNorm(8)
y = kernel.layers.LayerNorm.forward(norm, x)
torch.testing.assert_close(y, norm(x))
"""


def python(code, cwd):
    """What an isolated Python prints; it finds no checkout unless the code says so."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    return folder, export(folder)


def test_nothing_in_it_names_the_package(exported):
    folder, name = exported
    for backend in BACKENDS:
        build = folder / "build" / f"torch-{backend}"
        assert json.loads((build / "metadata.json").read_text())["id"] == f"{name}_{backend}"
        for path in build.rglob("*.py"):
            text = path.read_text()
            assert not re.search(r"^\s*(from|import) fusedformer", text, re.MULTILINE), path
            assert not re.search(r"torch\.ops\.fusedformer\b", text), path


@pytest.mark.slow
def test_it_works_without_the_package(exported, tmp_path):
    folder, _ = exported
    hide = 'import sys\nsys.modules["fusedformer"] = None\n'
    python(hide + LOAD.format(build=str(folder / "build/torch-cpu")) + USE, tmp_path)


@pytest.mark.slow
def test_it_works_beside_the_package(exported, tmp_path):
    folder, _ = exported
    same = """
import fusedformer
outs = []
for one in (kernel, fusedformer):
    torch.manual_seed(1)
    outs.append(one.attention(x, x, x, dropout_p=0.5, backend="reference"))
assert torch.equal(*outs)
"""
    python(LOAD.format(build=str(folder / "build/torch-cpu")) + USE + same, tmp_path)


@pytest.mark.slow
def test_the_package_kernels_loads_it(exported):
    kernels = pytest.importorskip("kernels")
    if not hasattr(kernels, "get_local_kernel"):
        pytest.skip("this package kernels is not Hugging Face's")
    folder, name = exported
    assert kernels.get_local_kernel(folder).__name__.startswith(name)
