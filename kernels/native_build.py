"""Builds the C++ library of csrc/cpu on first use, into the cache. Knows no op.

One library runs on every torch from 2.10 on: LibTorch's stable ABI, no libpython, no OpenMP.
"""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fusedformer.kernels import native_cache
from fusedformer.kernels.native_cache import SOURCES, BuildError, Library

FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    # NaN and infinity mean what they mean; only errno and floating-point traps are given up.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]

LINK_FLAGS = ["-shared"]

# Of the files *_kernels.cpp, which are compiled once for each; csrc/cpu/isa.h has the conventions.
# Options like a residual are asked for inside loops, where they are foreseen; a loop for each of
# their combinations would take minutes to compile. Neighbouring masks stay apart: g++ would put
# them together in a vector, one by one. (Its AVX-512 headers, in version 12, warn of themselves.)
# A product is fused with a sum only where a kernel says so: what must cancel exactly, does.
KERNEL_FLAGS = [
    *("-fno-exceptions", "-fno-rtti", "-fno-asynchronous-unwind-tables"),
    *("-fno-unswitch-loops", "-ffp-contract=off", "-fno-tree-slp-vectorize"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]
# Attention's are as fast as with -O3, and compile sooner; norms would lose a tenth. Others: -O3.
LEVELS = {"row_kernels": "-O3", "attention_kernels": "-O2"}
# For a CPU older than AVX2: what it gains by more, every build would pay. Rows take 2 to 25% longer
# with -Og than with -O1, but attention several times as long.
PORTABLE_LEVELS = {"row_kernels": "-Og", "attention_kernels": "-O1"}
# Of all other files, whose code runs once a call: compiled as one, as most of their time goes into
# reading torch's headers.
ENTRY_FLAGS = ["-O1"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
X86_ISAS = {
    "portable": [],
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512bf16": [*_AVX512, "-mavx512bf16"],
}


@dataclass(frozen=True)
class Compiler:
    path: str
    version: str  # its own first line
    isas: "dict[str, list[str]]"  # the instruction sets that it compiles for -> its flags


def find_compiler() -> Compiler:
    """The C++ compiler: ``CXX``, else the first of c++, g++ and clang++ on the PATH.

    Raises:
        BuildError: there is none, or it does not run.
    """
    if sys.platform == "win32":
        raise BuildError("the C++ kernels are not built on Windows yet")
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        raise BuildError(f"no C++ compiler found (looked for {', '.join(names)} on the PATH)")
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the C++ compiler {path} does not run ({error})") from error
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = X86_ISAS if x86 else {"portable": []}
    return Compiler(path, done.stdout.partition("\n")[0].strip(), isas)


def sources() -> list[Path]:
    """The kernels that take longest to compile come first."""
    return sorted((SOURCES / "cpu").glob("*.cpp"), reverse=True)


def _sources_key() -> str:
    paths = [*SOURCES.glob("*.h"), *(SOURCES / "cpu").glob("*.h"), *sources()]
    flags = (FLAGS, KERNEL_FLAGS, LEVELS, PORTABLE_LEVELS, ENTRY_FLAGS, LINK_FLAGS)
    return native_cache.files_key(SOURCES, paths, *flags)


def prebuilt_name() -> str:
    """The file name of a library that a wheel brings beside these very sources."""
    return f"libfusedformer_cpu-{_sources_key()}.so"


def find() -> Path:
    """The library: the one that a wheel brought, or build()'s."""
    prebuilt = SOURCES / prebuilt_name()
    return prebuilt if prebuilt.is_file() else build()


def compile_commands(compiler: Compiler, folder: Path) -> dict[Path, list[str]]:
    """For each object file in ``folder``, the command that makes it; what takes longest first."""
    include = Path(torch.__file__).parent / "include"
    common = [compiler.path, *FLAGS, "-I", str(SOURCES), "-isystem", str(include)]
    if len(compiler.isas) > 1:
        common.append("-DFUSEDFORMER_X86")
    kernels = [source for source in sources() if source.stem.endswith("_kernels")]
    first, *others = (source for source in sources() if source not in kernels)
    before = [part for other in others for part in ("-include", str(other))]
    target = folder / "entries.o"
    commands = {target: [*common, *ENTRY_FLAGS, *before, "-c", str(first), "-o", str(target)]}
    for source in kernels:
        for isa, flags in reversed(compiler.isas.items()):
            target = folder / f"{source.stem}.{isa}.o"
            levels = PORTABLE_LEVELS if isa == "portable" and len(compiler.isas) > 1 else LEVELS
            commands[target] = [
                *(*common, levels.get(source.stem, "-O3"), *KERNEL_FLAGS, *flags),
                *(f"-DFUSEDFORMER_ISA={isa}", "-c", str(source), "-o", str(target)),
            ]
    return commands


def link_command(compiler: Compiler, objects: list[Path], target: Path) -> list[str]:
    """torch is loaded before the library is, so no path to it is kept inside."""
    libraries = Path(torch.__file__).parent / "lib"
    return [
        *(compiler.path, *LINK_FLAGS, *map(str, objects)),
        *(f"-L{libraries}", "-ltorch_cpu", "-o", str(target)),
    ]


def _library() -> Library:
    if not sources():
        raise BuildError(f"there are no C++ sources in {SOURCES}")
    compiler = find_compiler()
    return Library(
        name="cpu",
        title="the CPU kernels",
        key=native_cache.key(_sources_key(), compiler, platform.machine()),
        compile=lambda folder: compile_commands(compiler, folder),
        link=lambda objects, target: link_command(compiler, objects, target),
        command="fusedformer build",
    )


def build(*, again: bool = False, retry: bool = False) -> Path:
    """The library, from the cache or built into it.

    Args:
        again: compile even if it is there.
        retry: compile even if that failed lately.

    Raises:
        BuildError: it cannot be built; the message is one line.
    """
    return native_cache.build(_library(), again=again, retry=retry)
