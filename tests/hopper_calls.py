"""What tests of the Hopper kernels share: building them for the emulator, and their arguments."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedformer.kernels import native_build_cuda, rng
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


class Tensor4(ctypes.Structure):
    """csrc/cuda/attention.h"""

    _fields_ = [("data", ctypes.c_void_p), *((n, ctypes.c_int64) for n in ("b", "h", "n"))]

    def __init__(self, tensor: torch.Tensor):
        assert tensor.stride(3) == 1
        super().__init__(tensor.data_ptr(), *tensor.stride()[:3])


class Attention(ctypes.Structure):
    """csrc/cuda/attention.h"""

    _fields_ = [
        *((n, ctypes.c_int) for n in ("batches", "heads", "key_heads", "n_queries", "n_keys")),
        ("dim", ctypes.c_int),
        ("dtype", ctypes.c_int),
        *((n, Tensor4) for n in ("query", "key", "value", "out")),
        ("lse", ctypes.c_void_p),
        ("key_lengths", ctypes.c_void_p),
        ("diagonal", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("seed", ctypes.c_void_p),
        ("threshold", ctypes.c_uint32),
        ("inverse_keep", ctypes.c_float),
        ("offsets", ctypes.c_int64 * 4),
        ("counter", ctypes.c_void_p),
    ]


def pointer(tensor: "torch.Tensor | None") -> "int | None":
    return None if tensor is None else tensor.data_ptr()


def poisoned(like: torch.Tensor) -> torch.Tensor:
    """A tensor as the op makes its outputs, in (B, N, H, D) memory order; of NaN."""
    batch, heads, length, dim = like.shape
    return torch.full((batch, length, heads, dim), torch.nan, dtype=like.dtype).transpose(1, 2)


def attention_call(tensors, options, out, lse) -> tuple[Attention, tuple]:
    """The arguments, of attention_cases' options; and what has to live as long as they do."""
    query, key, value = tensors
    p, offsets = options["dropout_p"], options["offsets"] or (0, 0, 0, 0)
    diagonal = key.shape[2]
    if options["causal"]:
        diagonal -= query.shape[2]
        if options["offsets"] is not None:
            diagonal = offsets[2] - offsets[3]
        diagonal = max(-query.shape[2], min(key.shape[2], diagonal))
    scale = query.shape[3] ** -0.5 if options["scale"] is None else options["scale"]
    seed = torch.tensor(options["seed"]) if p else None
    counter = torch.zeros((), dtype=torch.int32)
    call = Attention(
        *query.shape[:2], key.shape[1], query.shape[2], *key.shape[2:],
        0 if query.dtype == torch.bfloat16 else 1,
        Tensor4(query), Tensor4(key), Tensor4(value), Tensor4(out), pointer(lse),
        pointer(options["key_lengths"]), diagonal, scale, pointer(seed),
        rng.threshold(p), 1 / (1 - p), (ctypes.c_int64 * 4)(*offsets), pointer(counter),
    )  # fmt: skip
    return call, (seed, counter, tensors, out, lse, options)
