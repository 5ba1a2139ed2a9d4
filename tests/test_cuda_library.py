"""The CUDA library as it is shipped, built by nvcc, on a machine that may have no GPU."""

import os
import re
import subprocess
import sys

import hopper_calls
import pytest

from fusedformer.benchmarks import cuda_variants
from fusedformer.kernels import native_build_cuda

pytestmark = [pytest.mark.slow, hopper_calls.needs_nvcc]

# With all its symbols bound, and before torch would bind them when they are called.
LOAD = """
import ctypes, sys, torch
ctypes.CDLL(sys.argv[1], mode=2)  # RTLD_NOW
torch.ops.load_library(sys.argv[1])
ops = torch.ops.fusedformer_cuda
x = torch.zeros(1, 1, 8, 8, dtype=torch.half)
options = (None, None, 8, 1.0, 0, 1.0, 0, 0, 0, 0)
for call in (
    lambda: ops.attention_fwd(x, x, x, *options),
    lambda: ops.attention_bwd(x, None, x, x[..., 0].float(), x, x, x, *options, False),
):
    try:
        call()
    except NotImplementedError as error:
        assert "with arguments from the 'CPU' backend" in str(error), error
    else:
        raise AssertionError("it took tensors of the CPU")
"""


def test_the_library_loads_without_a_gpu(tmp_path, tmp_path_factory):
    objects = [
        hopper_calls.compiled(tmp_path_factory, source.name)[0]
        for source in native_build_cuda.sources()
    ]
    path = tmp_path / "library.so"
    command = native_build_cuda.link_command(hopper_calls.nvcc(), objects, path)
    subprocess.run(command, check=True)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, path], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_variants_compile(tmp_path):
    """As the kernels do: nothing spilled, and no product waits for another."""
    commands = native_build_cuda.compile_commands(
        hopper_calls.nvcc(), tmp_path, native_build_cuda.variant_sources()
    )
    sizes = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    for command in commands.values():
        done = subprocess.run(command, capture_output=True, text=True)
        report = done.stdout + done.stderr
        assert done.returncode == 0, report
        assert not re.findall(r".*(?:C75\d\d|warning).*", report)
        assert set(re.findall(sizes, report)) <= {("0", "0", "0")}
    library = tmp_path / "variants.so"
    subprocess.run(
        native_build_cuda.variants_link(hopper_calls.nvcc(), list(commands), library), check=True
    )
    loaded = cuda_variants.load(library)
    assert len({(v.name, v.dim) for v in cuda_variants.listed(loaded)}) == loaded.variant_count()
