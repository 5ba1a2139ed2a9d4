"""Builds the CUDA library of csrc/cuda for Hopper, into the cache, on any machine that has nvcc.

No GPU is needed, and a torch without CUDA is enough: one library loads on both kinds of torch, from
2.10 on (LibTorch's stable ABI; the few functions that torch has with CUDA alone are weak symbols;
the CUDA runtime is inside). Nothing builds it unasked: `fusedformer build cuda` does, or the first
call that names the backend on a GPU that it is for.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fusedformer.kernels import native_build, native_cache
from fusedformer.kernels.native_cache import SOURCES, BuildError, Library

# What `fusedformer doctor` says of the architecture below.
CAPABILITY = (9, 0)
GPUS = "GPUs of compute capability 9.0 (H100, H200)"

_ARCHITECTURE = "-gencode=arch=compute_90a,code=sm_90a"

FLAGS = [
    "-std=c++17",
    "-O3",
    _ARCHITECTURE,
    # Profilers and compute-sanitizer name lines; the code is the same.
    "-lineinfo",
    # Registers and spills of every kernel, which tests read.
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unknown-pragmas",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DUSE_CUDA",
]

# libtorch has nothing of its own, so that the linker would drop it; but it brings libtorch_cpu, and
# libtorch_cuda where torch has CUDA. In one option, as nvcc does not keep the order of several.
LINK_FLAGS = [
    *("-shared", "-cudart=static", "-cudadevrt=none", _ARCHITECTURE),
    "-Xlinker=--no-as-needed,-ltorch,--as-needed",
]

# The oldest that FlashAttention-3 asks for, too. Ours has been compiled with 13.0.
OLDEST = (12, 3)


@dataclass(frozen=True)
class Nvcc:
    path: str
    version: str  # such as 13.0.88
    host: str  # path and version of the C++ compiler that it calls
    host_path: str

    def home(self) -> Path:
        """The folder of its toolkit."""
        return Path(self.path).parent.parent


def _candidates() -> Iterator[Path]:
    """Where nvcc may be: in CUDA_HOME, if that is set; else the PATH, the usual place, pip's."""
    home = os.environ.get("CUDA_HOME")
    if home:
        yield Path(home) / "bin/nvcc"
        return
    found = shutil.which("nvcc")
    if found:
        yield Path(found)
    yield Path("/usr/local/cuda/bin/nvcc")
    # pip install "cuda-toolkit[nvcc,cudart,cccl]"; part of torch's own CUDA packages, but for nvcc.
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations or () if packages else ():
        yield from sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True)


def find_nvcc() -> Nvcc:
    """nvcc, and the C++ compiler that it is to call.

    Raises:
        BuildError: there is none, or it is too old, or does not run; one line.
    """
    compiler = native_build.find_compiler()
    reason = ""
    for path in _candidates():
        if not os.access(path, os.X_OK):
            continue
        try:
            done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = reason or f"{path} does not run ({error})"
            continue
        found = re.search(r"release (\d+)\.(\d+), V([\d.]+)", done.stdout)
        if found and (int(found[1]), int(found[2])) >= OLDEST:
            host = f"{compiler.path}: {compiler.version}"
            return Nvcc(str(path), found[3], host, compiler.path)
        version = found[3] if found else "of unknown version"
        wanted = ".".join(map(str, OLDEST))
        reason = reason or f"nvcc {version} ({path}) is too old: {wanted} or later is needed"
    if not reason:
        home = os.environ.get("CUDA_HOME")
        places = "the PATH, in /usr/local/cuda and in the package cuda-toolkit[nvcc]"
        reason = f"no nvcc found (looked {f'in CUDA_HOME, {home}' if home else f'on {places}'})"
    raise BuildError(reason)


def sources() -> list[Path]:
    """What is compiled, an object each."""
    folder = SOURCES / "cuda"
    return sorted([*folder.glob("*.cu"), *folder.glob("*.cpp")])


def _headers() -> list[Path]:
    return [*SOURCES.glob("*.h"), *(SOURCES / "cuda").glob("*.h")]


def _sources_key() -> str:
    return native_cache.files_key(SOURCES, [*_headers(), *sources()], FLAGS, LINK_FLAGS)


def prebuilt_name() -> str:
    """The file name of a library that a wheel brings beside these very sources."""
    return f"libfusedformer_cuda-{_sources_key()}.so"


def compile_commands(
    nvcc: Nvcc, folder: Path, paths: "list[Path] | None" = None
) -> dict[Path, list[str]]:
    """For each object file in ``folder``, the command that makes it; of sources() by default."""
    include = Path(torch.__file__).parent / "include"
    common = [nvcc.path, f"-ccbin={nvcc.host_path}", *FLAGS]
    common += ["-I", str(SOURCES), "-isystem", str(include)]
    commands = {}
    for source in sources() if paths is None else paths:
        target = folder / f"{source.name}.o"
        commands[target] = [*common, "-c", str(source), "-o", str(target)]
    return commands


def link_command(nvcc: Nvcc, objects: list[Path], target: Path) -> list[str]:
    """torch is loaded before the library is, so no path to it is kept inside."""
    # pip's toolkit has its libraries in lib, where its own nvcc does not look.
    folders = [Path(torch.__file__).parent / "lib", nvcc.home() / "lib64", nvcc.home() / "lib"]
    return [
        *(nvcc.path, f"-ccbin={nvcc.host_path}", *map(str, objects)),
        *(f"-L{folder}" for folder in folders if folder.is_dir()),
        *(*LINK_FLAGS, "-o", str(target)),
    ]


def _library(nvcc: Nvcc) -> Library:
    return Library(
        name="cuda",
        title="the CUDA kernels",
        key=native_cache.key(_sources_key(), nvcc, platform.machine()),
        compile=lambda folder: compile_commands(nvcc, folder),
        link=lambda objects, target: link_command(nvcc, objects, target),
        command="fusedformer build cuda",
    )


def _checked_sources() -> None:
    if not sources():
        raise BuildError(f"there are no CUDA sources in {SOURCES}")


def present() -> "Path | None":
    """The library that a wheel brought, or that is in the cache; None: it is still to be built.

    Raises:
        BuildError: it cannot be built, as far as one sees without trying; one line.
    """
    prebuilt = SOURCES / prebuilt_name()
    if prebuilt.is_file():
        return prebuilt
    _checked_sources()
    library = _library(find_nvcc())
    if library.path().is_file():
        return library.path()
    if reason := native_cache.failed_lately(library):
        raise BuildError(reason)
    return None


def find() -> Path:
    """The library: the one that a wheel brought, or build()'s."""
    prebuilt = SOURCES / prebuilt_name()
    return prebuilt if prebuilt.is_file() else build()


def build(*, again: bool = False, retry: bool = False) -> Path:
    """As native_build.build()."""
    _checked_sources()
    return native_cache.build(_library(find_nvcc()), again=again, retry=retry)


def variant_sources() -> list[Path]:
    """The choices that benchmarks/tune_cuda.py measures, of which no other code knows."""
    return sorted((SOURCES / "cuda/variants").glob("*.cu"))


def variants_link(nvcc: Nvcc, objects: list[Path], target: Path) -> list[str]:
    """As link_command(), but without torch."""
    folders = [path for path in (nvcc.home() / "lib64", nvcc.home() / "lib") if path.is_dir()]
    command = [nvcc.path, f"-ccbin={nvcc.host_path}", *map(str, objects)]
    command += [f"-L{folder}" for folder in folders]
    options = ["-shared", "-cudart=static", "-cudadevrt=none", _ARCHITECTURE]
    return [*command, *options, "-o", str(target)]


def build_variants() -> Path:
    """The library of the variants, from the cache or built into it. It needs no torch.

    Raises:
        BuildError: it cannot be built; one line.
    """
    nvcc = find_nvcc()
    paths = variant_sources()
    headers = [*_headers(), *(SOURCES / "cuda/variants").glob("*.h")]
    sources_key = native_cache.files_key(SOURCES, [*headers, *paths], FLAGS)
    library = Library(
        name="cuda-variants",
        title="variants of the CUDA kernels",
        key=native_cache.key(sources_key, nvcc, platform.machine()),
        compile=lambda folder: compile_commands(nvcc, folder, paths),
        link=lambda objects, target: variants_link(nvcc, objects, target),
        command="python -m fusedformer.benchmarks.tune_cuda",
    )
    return native_cache.build(library, retry=True)
