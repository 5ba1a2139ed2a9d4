"""The backend cuda between Python and a launch, without a GPU: reasons, arguments, the library."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedformer
from fusedformer.kernels import dispatch, native_build_cuda
from fusedformer.kernels.cuda import attention as on_cuda
from fusedformer.kernels.cuda import library
from fusedformer.kernels.native_cache import BuildError

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("c++") or shutil.which("g++")

# --- Reasons --------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch):
    """As if the CPU were a Hopper GPU and the library there."""
    monkeypatch.setattr(on_cuda, "unsupported_gpu", lambda device: None)
    monkeypatch.setattr(on_cuda, "library", lambda: ("cuda.so", None))


def reason(**changes) -> "str | None":
    """Why a call is not taken: bfloat16, (2, 4, 20, 64) and no options, but for the changes."""
    tensors = {name: torch.zeros(2, 4, 20, 64).bfloat16() for name in ("query", "key", "value")}
    options = {
        "mask": None, "key_lengths": None, "seed": None, "diagonal": None, "scale": 0.1,
        "dropout_p": 0.0, "offsets": [0, 0, 0, 0],
    }  # fmt: skip
    return on_cuda.attention_unsupported(*(tensors | options | changes).values())


def bfloat16(*size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"query": torch.zeros(2, 4, 20, 64)}, "take float16 and bfloat16; .* are torch.float32"),
        ({"query": bfloat16(2, 4, 20, 60)}, "head dimensions of 8, 16, .* this one is 60"),
        ({"query": bfloat16(2, 4, 20, 264)}, "head dimensions of 8, 16, .* this one is 264"),
        ({"mask": torch.ones(1, 1, 1, 20, dtype=torch.bool)}, "no mask"),
        ({"scale": 0.0}, "a positive scale; this one is 0.0"),
        ({"scale": -0.1}, "a positive scale; this one is -0.1"),
        ({"query": bfloat16(1, 1, 1, 8).expand(1, 1, 2**30, 8)}, r"2\^30 queries or keys"),
        ({"key": bfloat16(1, 1, 1, 64).expand(2, 4, 2**30, 64)}, r"2\^30 queries or keys"),
        ({"query": bfloat16(1, 1, 1, 8).expand(2**15, 16, 2**18, 8)}, r"is 2\^37 or more"),
        ({"query": bfloat16(2, 4, 64, 20).mT}, r"query has strides \(5120, 1280, 1, 20\)"),
        ({"key": bfloat16(1, 4, 20, 64).expand(2, -1, -1, -1)}, r"key has strides \(0, 1280, 64,"),
        ({"value": bfloat16(2, 4, 20, 65)[..., :64]}, r"value has strides \(5200, 1300, 65, 1\)"),
        ({"value": bfloat16(10248)[8:].view(2, 4, 20, 64)}, None),
        ({"value": bfloat16(10241)[1:].view(2, 4, 20, 64)}, "value does not start on 16 bytes"),
        # The stride of a dimension of size 1 means nothing.
        ({"query": bfloat16(20, 64).as_strided((1, 1, 20, 64), (3, 0, 64, 1))}, None),
        ({"query": bfloat16(2, 20, 4, 64).transpose(1, 2), "scale": 2.0}, None),
    ],
)
def test_reasons(hopper, changes, text):
    found = reason(**changes)
    if text is None:
        assert found is None
    else:
        assert re.search(text, found), found


def test_devices(monkeypatch):
    """A device's reason comes before those of a call; the library is asked for last."""
    monkeypatch.setattr(on_cuda, "library", lambda: pytest.fail("asked for"))
    assert "the tensors are on cpu" in reason(scale=0.0)
    monkeypatch.setattr(library, "_capability", lambda index: (8, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert library.unsupported_gpu(torch.device("cuda")) == "no CUDA GPU is available"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    wanted = "the CUDA kernels need GPUs of compute capability 9.0 (H100, H200); cuda:1 has 8.0"
    assert library.unsupported_gpu(torch.device("cuda:1")) == wanted
    monkeypatch.setattr(library, "_capability", lambda index: (9, 0))
    assert library.unsupported_gpu(torch.device("cuda:1")) is None


def test_asking_builds_nothing(monkeypatch):
    monkeypatch.setattr(library, "unsupported_gpu", lambda device: None)
    monkeypatch.setattr(native_build_cuda, "build", lambda **options: pytest.fail("built"))
    monkeypatch.setattr(native_build_cuda, "present", lambda: None)
    assert fusedformer.available_backends("attention", "cuda")["cuda"] is None

    def none():
        raise BuildError("no nvcc found")

    monkeypatch.setattr(native_build_cuda, "present", none)
    said = "there is no CUDA library: no nvcc found"
    assert fusedformer.available_backends("attention", "cuda")["cuda"] == said
    assert fusedformer.available_backends("dropout")["cuda"] == "it does not have this op yet"


def test_it_is_never_chosen_unnamed():
    assert not any("cuda" in names for names in dispatch.PREFERENCE.values())
    q = torch.randn(1, 1, 4, 8, dtype=torch.half)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: the CUDA kernels need GPUs"):
        fusedformer.attention(q, q, q, backend="cuda")


# --- Arguments ------------------------------------------------------------------------------------

# The entry points as they are, with loops over host memory in the kernels' place.
CALLS = """
import ctypes, sys
sys.path.insert(0, "tests")
import torch
torch.ops.load_library(sys.argv[1])
from fusedformer.kernels.cuda import attention as on_cuda
on_cuda.unsupported_gpu = lambda device: None
on_cuda.library = lambda: (sys.argv[1], None)

import attention_cases, test_attention
cases = [attention_cases.taken_by_cuda(case) for case in attention_cases.CASES]
cases = [c for c in cases if test_attention._scores(c) < 15_000]
torch.utils.deterministic.fill_uninitialized_memory = True
for n, case in enumerate(cases):
    torch.use_deterministic_algorithms(n % 2 == 0)
    dtype = (torch.float16, torch.bfloat16)[n // 2 % 2]
    test_attention.check_pairs({**case, "dtype": dtype}, "cpu", ("reference", "cuda"))
    guards = ctypes.CDLL(sys.argv[1]).fusedformer_guards()
    assert guards == 3 * (n + 1)  # a forward, and a backward after each forward
print(len(cases))
"""


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler here")
def test_every_argument_arrives(tmp_path):
    """In a process of its own: of the entry points a process can load one set."""
    torch_folder, path = Path(torch.__file__).parent, tmp_path / "plain.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-Bsymbolic"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    flags += [f"-I{ROOT / 'csrc'}", "-isystem", str(torch_folder / "include")]
    source = str(ROOT / "tests/hopper/launchers_plain.cpp")
    link = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-o", str(path)]
    subprocess.run([str(COMPILER), *flags, source, *link], check=True)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CALLS, path], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 40
