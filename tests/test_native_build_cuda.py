"""The builder of the CUDA library: nvcc or a reason why not; what it builds loads without a GPU."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedformer import build, cli
from fusedformer.kernels import native_build_cuda, native_cache
from fusedformer.kernels.cuda import attention as on_cuda
from fusedformer.kernels.cuda import library

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)


def no_nvcc() -> "str | None":
    """Why the CUDA library cannot be built here, or None."""
    try:
        native_build_cuda.find_nvcc()
    except native_cache.BuildError as error:
        return str(error)
    return None


needs_nvcc = pytest.mark.skipif(no_nvcc() is not None, reason=str(no_nvcc()))


def fake_nvcc(home: Path, said: str, code: int = 0) -> Path:
    path = home / "bin/nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho '{said}'\nexit {code}\n")
    path.chmod(0o755)
    return path


def release(version: str) -> str:
    major, minor, _ = version.split(".")
    return f"Cuda compilation tools, release {major}.{minor}, V{version}"


def find(monkeypatch, *homes: Path) -> str:
    """The path of what is found in the toolkits given, or the reason."""
    paths = [home / "bin/nvcc" for home in homes]
    monkeypatch.setattr(native_build_cuda, "_candidates", lambda: iter(paths))
    try:
        return native_build_cuda.find_nvcc().path
    except native_cache.BuildError as error:
        return str(error)


def test_which_nvcc(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    none, old, broken, new = (tmp_path / name for name in ("none", "old", "broken", "new"))
    said = "no nvcc found (looked on the PATH, in /usr/local/cuda and in the package cuda-toolkit"
    assert find(monkeypatch, none).startswith(said)
    path = fake_nvcc(old, release("11.8.89"))
    said = f"nvcc 11.8.89 ({path}) is too old: 12.3 or later is needed"
    assert find(monkeypatch, none, old) == said
    path = fake_nvcc(broken, "", code=1)
    assert f"{path} does not run (" in find(monkeypatch, broken)
    assert "\n" not in find(monkeypatch, broken)
    path = fake_nvcc(new, release("12.10.1"))
    assert find(monkeypatch, none, old, broken, new) == str(path)


def test_where_it_is_looked_for(monkeypatch, tmp_path):
    def candidates():
        return [str(path) for path in native_build_cuda._candidates()]

    on_path = fake_nvcc(tmp_path / "path", release("13.0.1"))
    packaged = fake_nvcc(tmp_path / "site/nvidia/cu13", release("13.0.1"))
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    assert candidates()[:2] == [str(on_path), "/usr/local/cuda/bin/nvcc"]
    assert str(packaged) in candidates()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "named"))
    assert candidates() == [str(tmp_path / "named/bin/nvcc")]


def test_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cli.main(["build", "cuda"]) == 2
    said = f"no nvcc found (looked in CUDA_HOME, {tmp_path})"
    assert capsys.readouterr().err == f"fusedformer build: {said}\n"
    assert library.about()["error"] == said
    # Unnamed it is built beside a Hopper GPU alone, and there it may fail.
    built = []

    def note(name, args):
        built.append(name)
        if name == "cuda":
            raise OSError(said)

    monkeypatch.setattr(build, "_build", note)
    for has_gpu, wanted in ((False, ["cpu"]), (True, ["cpu", "cuda"])):
        monkeypatch.setattr(build, "_has_gpu", lambda has_gpu=has_gpu: has_gpu)
        assert cli.main(["build"]) == 0
        assert built == wanted
        built.clear()
    assert capsys.readouterr().err == f"fusedformer build: no CUDA kernels: {said}\n"


def test_every_size_of_tile_is_compiled():
    """One that is launched and compiled nowhere would show only when the library is loaded."""
    folder = ROOT / "csrc/cuda"
    for direction in ("forward", "backward"):
        name = f"launch_{direction}"
        launched = re.findall(rf"{name}<(\d+)>", (folder / f"attention_{direction}.cu").read_text())
        compiled = [
            size
            for path in folder.glob(f"attention_{direction}_*.cu")
            for size in re.findall(rf"template void {name}<(\d+)>", path.read_text())
        ]
        assert sorted(launched) == sorted(compiled)
        assert max(map(int, launched)) == on_cuda.MAX_DIM


# --- Built ----------------------------------------------------------------------------------------

# One trivial kernel, the real entry points and tensor maps.
KERNELS = """
#include "tensor_map.h"

namespace fusedformer {
namespace hopper {

__global__ void fill(float* lse) { *lse = 1; }

void attention_forward(const Attention& p, CUstream_st* stream) {
  tensor_map(p.query, p.dtype, p.batches, p.heads, p.n_queries, p.dim, 64);
  fill<<<1, 1, 0, stream>>>(p.lse);
}
void attention_backward(const Attention&, const AttentionGrads&, CUstream_st*) {}
int64_t attention_backward_workspace(const Attention&, bool) { return 256; }

}  // namespace hopper
}  // namespace fusedformer
"""

BUILD = """
import pathlib, sys, torch
from fusedformer.kernels import native_build_cuda
native_build_cuda.SOURCES = pathlib.Path(sys.argv[1])
assert native_build_cuda.present() is None
path = native_build_cuda.build()
assert native_build_cuda.present() == path == native_build_cuda.build()
torch.ops.load_library(str(path))
ops = torch.ops.fusedformer_cuda
print(path, *(op.default._schema.name for op in (ops.attention_fwd, ops.attention_bwd)))
x = torch.zeros(1, 1, 8, 8, dtype=torch.half)
try:
    ops.attention_fwd(x, x, x, None, None, 8, 1.0, 0, 1.0, 0, 0, 0, 0)
except NotImplementedError as error:
    assert "'CPU' backend" in str(error)
"""


@pytest.mark.slow
@needs_nvcc
def test_a_library_without_a_gpu(tmp_path):
    """On the torch that is here, be it one without CUDA: it compiles, loads and has its ops."""
    sources = tmp_path / "csrc"
    (sources / "cuda").mkdir(parents=True)
    shutil.copy(ROOT / "csrc/philox.h", sources)
    for path in [*(ROOT / "csrc/cuda").glob("*.h"), ROOT / "csrc/cuda/ops.cpp"]:
        shutil.copy(path, sources / "cuda")
    (sources / "cuda/attention.cu").write_text(KERNELS)
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, sources], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    path, *names = done.stdout.split()
    assert names == ["fusedformer_cuda::attention_fwd", "fusedformer_cuda::attention_bwd"]
    if shutil.which("readelf"):
        dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True).stdout
        needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
        # Not CUDA's runtime or driver, nor Python.
        own = ("libtorch.so", "libstdc++", "libgcc_s", "libc.so", "libm.so", "ld-linux")
        assert not [name for name in needed if not name.startswith(own)], needed
        assert "libtorch.so" in needed


# --- Tensor maps ----------------------------------------------------------------------------------


@pytest.mark.slow
@needs_nvcc
def test_tensor_maps(tmp_path):
    """What the driver is asked for, of tensors in several layouts; and its errors."""
    nvcc = native_build_cuda.find_nvcc()
    source, path = ROOT / "tests/hopper/tensor_map_main.cu", tmp_path / "maps.so"
    command = [nvcc.path, f"-ccbin={nvcc.host_path}", *native_build_cuda.FLAGS]
    command += ["-I", str(ROOT / "csrc/cuda"), "-shared", "-cudadevrt=none"]
    folders = [f"-L{nvcc.home() / name}" for name in ("lib64", "lib")]
    subprocess.run([*command, *folders, source, "-o", path], check=True, capture_output=True)
    function = ctypes.CDLL(str(path)).make
    function.restype = ctypes.c_char_p

    def make(tensor, rows, error=0, result=0):
        seen = (ctypes.c_ulonglong * 24)()
        strides = (ctypes.c_longlong * 4)(*tensor.stride())
        sizes = (ctypes.c_int * 4)(*tensor.shape)
        float16 = tensor.dtype == torch.float16
        data = ctypes.c_void_p(tensor.data_ptr())
        said = function(error, result, data, strides, sizes, float16, rows, seen)
        return said.decode(), list(seen[:21])

    tensor = torch.zeros(2, 20, 3, 72, dtype=torch.float16).transpose(1, 2)[..., :40]
    assert "cannot be asked" in make(tensor, 64, error=35)[0]
    # CUtensorMapDataType: 6 is FLOAT16, 9 is BFLOAT16; CUtensorMapSwizzle: 3 is 128 bytes.
    about = [4, tensor.data_ptr(), 0, 3, 0]
    layout = [40, 20, 3, 2, 3 * 72 * 2, 72 * 2, 20 * 3 * 72 * 2]
    assert make(tensor, 64) == ("", [6, *about, *layout, 64, 64, 1, 1, 1, 1, 1, 1])
    # Strides that mean nothing are replaced by one that TMA takes.
    tensor = torch.zeros(128, dtype=torch.bfloat16).as_strided((1, 1, 1, 128), (3, 0, 2**50, 1))
    about[1] = tensor.data_ptr()
    wanted = [9, *about, 128, 1, 1, 1, 16, 16, 16, 64, 128, 1, 1, 1, 1, 1, 1]
    assert make(tensor, 128) == ("", wanted)
    said = "TMA cannot describe a tensor of (B, H, N, D) = (1, 1, 1, 128) with strides of (16, 16,"
    assert said in make(tensor, 128, result=1)[0]
