"""What tests of the Hopper kernels share: building them for the emulator, and their arguments."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedformer.benchmarks.cuda_variants import Attention, attention_arguments
from fusedformer.kernels import native_build_cuda
from fusedformer.kernels.native_cache import BuildError

FOLDER = Path(__file__).parent / "hopper"
CUDA = FOLDER.parent.parent / "csrc" / "cuda"
# The emulator switches stacks as Linux does it.
COMPILER = (shutil.which("c++") or shutil.which("g++")) if sys.platform == "linux" else None
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi", "-fPIC"]


def nvcc() -> "native_build_cuda.Nvcc | None":
    """The nvcc that would build the library, or None."""
    try:
        return native_build_cuda.find_nvcc()
    except BuildError:
        return None


needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="there is no nvcc here")


def compiled(factory: pytest.TempPathFactory, source: str) -> tuple[Path, str]:
    """An object of the CUDA library, and what nvcc said of it. Compiled once in a run of tests, in
    however many processes: by the first who asks."""
    import fcntl  # not on Windows, where there is no nvcc for us

    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "cuda_objects"
    folder.mkdir(exist_ok=True)
    target = folder / f"{source}.o"
    report = folder / f"{source}.txt"
    with (folder / f"{source}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not report.is_file():
            command = native_build_cuda.compile_commands(nvcc(), folder)[target]
            done = subprocess.run(command, capture_output=True, text=True)
            report.write_text(done.stdout + done.stderr)
    assert target.is_file(), report.read_text()
    return target, report.read_text()


def check_bit_loop(sass: str) -> None:
    """The loop that makes dropout's bits: four calls of Philox, at most 65 instructions each."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/ +(.*?);", sass)]
    ends = [(to, at) for at, text in code for to in re.findall(r"BRA (0x\w+)", text)]
    loops = [[text for at, text in code if int(to, 16) <= at <= last] for to, last in ends]

    def products(loop: list[str]) -> int:
        return sum(text.startswith("IMAD.WIDE.U32") for text in loop)

    loop = max(loops, key=lambda loop: (products(loop), -len(loop)))
    # 4 x 14 products but for those that the row or the column decides; comparisons are gathered.
    assert 40 <= products(loop) <= 52
    assert sum(text.startswith("ISETP.GE.U32") for text in loop) == 4 * 16
    assert sum(text.startswith("P2R") for text in loop) == 8
    assert len(loop) <= 4 * 65


_emulator: list[Path] = []  # it takes seconds to build, and serves every module of a run


def build_emulator(folder: Path) -> list[Path]:
    """The emulator's object files, to be linked with a driver. Built once, in the first folder."""
    if not _emulator:
        built = []
        for source in sorted(FOLDER.glob("emulator*.cpp")):
            built.append(folder / f"{source.stem}.o")
            command = [COMPILER, *FLAGS, f"-I{FOLDER}", "-c", source, "-o", built[-1]]
            subprocess.run(command, check=True)
        _emulator.extend(built)
    return _emulator


def build_driver(
    driver: str, dim: int, path: Path, emulator: list[Path], cuda: Path = CUDA, flags: tuple = ()
) -> ctypes.CDLL:
    """A driver of tests/hopper, for the kernels of ``cuda`` and the tile of one head dimension."""
    subprocess.run(
        [COMPILER, *FLAGS, "-shared", f"-DDIM={dim}", f"-I{FOLDER}", f"-I{cuda}", *flags,
         FOLDER / driver, *emulator, "-o", path],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(path))


def pointer(tensor: "torch.Tensor | None") -> "int | None":
    return None if tensor is None else tensor.data_ptr()


def poisoned(like: torch.Tensor) -> torch.Tensor:
    """A tensor as the op makes its outputs, in (B, N, H, D) memory order; of NaN."""
    batch, heads, length, dim = like.shape
    return torch.full((batch, length, heads, dim), torch.nan, dtype=like.dtype).transpose(1, 2)


def attention_call(tensors, options, out, lse) -> tuple[Attention, tuple]:
    """The arguments, of attention_cases' options; and what has to live as long as they do."""
    query, key, _ = tensors
    p, offsets = options["dropout_p"], options["offsets"] or (0, 0, 0, 0)
    diagonal = key.shape[2]
    if options["causal"]:
        diagonal -= query.shape[2]
        if options["offsets"] is not None:
            diagonal = offsets[2] - offsets[3]
        diagonal = max(-query.shape[2], min(key.shape[2], diagonal))
    seed = torch.tensor(options["seed"]) if p else None
    counter = torch.zeros((), dtype=torch.int32)
    call = attention_arguments(
        *tensors, out, lse, counter, key_lengths=options["key_lengths"], seed=seed,
        diagonal=diagonal, scale=options["scale"], dropout_p=p, offsets=offsets,
    )  # fmt: skip
    return call, (seed, counter, tensors, out, lse, options)
