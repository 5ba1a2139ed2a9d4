"""Builds the C++ library of csrc/ on first use, into a cache. Knows no op.

- The library is keyed by sources, flags and compiler. It appears in the cache under its name in one
  step, when it is whole: an interrupted build leaves nothing that could be loaded, and two
  processes that want it wait for one another.
- A failure has one line of reason; what the compiler said is in the log that the line names. A
  compile that failed is not tried again within a day, except by ``fusedformer build``.
- One library runs on every torch from 2.10 on: LibTorch's stable ABI, no libpython, no OpenMP.
"""

import contextlib
import hashlib
import importlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

# In a checkout beside kernels/; installed, as fusedformer/csrc.
SOURCES = Path(__file__).resolve().parent.parent / "csrc"

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
    "-O3",
    *("-fno-exceptions", "-fno-rtti", "-fno-unswitch-loops", "-ffp-contract=off"),
    "-fno-tree-slp-vectorize",
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]
# Of all other files, whose code runs once a call.
ENTRY_FLAGS = ["-O1"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
X86_ISAS = {
    "portable": ["-O1"],  # for a CPU older than AVX2: what it gains by -O3, every build would pay
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512bf16": [*_AVX512, "-mavx512bf16"],
}

RETRY_SECONDS = 24 * 3600


class BuildError(RuntimeError):
    """Why there is no library: one line."""


@dataclass(frozen=True)
class Compiler:
    path: str
    version: str  # its own first line
    isas: "dict[str, list[str]]"  # the instruction sets that it compiles for -> its flags


def cache_folder() -> Path:
    """Where built libraries are kept: as the platform has it, XDG_CACHE_HOME before all."""
    named = os.environ.get("XDG_CACHE_HOME")
    if named and os.path.isabs(named):
        return Path(named) / "fusedformer"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "fusedformer"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/fusedformer"
    return Path.home() / ".cache/fusedformer"


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
    return sorted((SOURCES / "cpu").glob("*.cpp"))


def _sources_key() -> str:
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.h"), *(SOURCES / "cpu").glob("*.h"), *sources()]):
        digest.update(f"{path.relative_to(SOURCES)}\0".encode() + path.read_bytes() + b"\0")
    digest.update(repr((FLAGS, KERNEL_FLAGS, ENTRY_FLAGS, LINK_FLAGS)).encode())
    return digest.hexdigest()[:16]


def _key(compiler: Compiler) -> str:
    """Of all that decides what the library holds."""
    parts = repr((_sources_key(), compiler, platform.machine()))
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def prebuilt_name() -> str:
    """The file name of a library that a wheel brings beside these very sources."""
    return f"libfusedformer_cpu-{_sources_key()}.so"


def find() -> Path:
    """The library: the one that a wheel brought, or build()'s."""
    prebuilt = SOURCES / prebuilt_name()
    return prebuilt if prebuilt.is_file() else build()


def compile_commands(compiler: Compiler, folder: Path) -> dict[Path, list[str]]:
    """For each object file in ``folder``, the command that makes it."""
    include = Path(torch.__file__).parent / "include"
    common = [compiler.path, *FLAGS, "-I", str(SOURCES), "-isystem", str(include)]
    if len(compiler.isas) > 1:
        common.append("-DFUSEDFORMER_X86")
    commands = {}
    for source in sources():
        variants = {"": ENTRY_FLAGS}
        if source.stem.endswith("_kernels"):
            variants = {
                f".{isa}": [*KERNEL_FLAGS, *flags, f"-DFUSEDFORMER_ISA={isa}"]
                for isa, flags in compiler.isas.items()
            }
        for suffix, flags in variants.items():
            target = folder / f"{source.stem}{suffix}.o"
            commands[target] = [*common, *flags, "-c", str(source), "-o", str(target)]
    return commands


def link_command(compiler: Compiler, objects: list[Path], target: Path) -> list[str]:
    """torch is loaded before the library is, so no path to it is kept inside."""
    libraries = Path(torch.__file__).parent / "lib"
    return [
        *(compiler.path, *LINK_FLAGS, *map(str, objects)),
        *(f"-L{libraries}", "-ltorch_cpu", "-o", str(target)),
    ]


def _ninja() -> "str | None":
    """The ninja of the system, or of its Python package."""
    found = shutil.which("ninja")
    if found is None:
        with contextlib.suppress(ImportError):
            found = shutil.which("ninja", path=importlib.import_module("ninja").BIN_DIR)
    return found


def _ninja_file(objects: dict[Path, list[str]], link: list[str], library: Path) -> str:
    def text(command: list[str]) -> str:
        return " ".join(part.replace("$", "$$") for part in map(_quoted, command))

    def path(name: Path) -> str:
        return str(name).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

    lines = ["rule run", "  command = $line", "  description = $out"]
    for target, command in [*objects.items(), (library, link)]:
        needs = " ".join(map(path, objects)) if target == library else ""
        lines += [f"build {path(target)}: run {needs}", f"  line = {text(command)}"]
    return "\n".join(lines) + "\n"


def _quoted(part: str) -> str:
    return "'" + part.replace("'", "'\\''") + "'" if set(part) & set(" '\"$&;()<>|*?\\") else part


def _run(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    return done.returncode, f"{' '.join(command)}\n{done.stdout}"


def _compile(compiler: Compiler, folder: Path) -> tuple[bool, str, Path]:
    """Builds in ``folder``: whether it went well, what was said, and the library."""
    library = folder / "library.so"
    objects = compile_commands(compiler, folder)
    link = link_command(compiler, list(objects), library)
    ninja = _ninja()
    if ninja is not None:
        (folder / "build.ninja").write_text(_ninja_file(objects, link, library))
        code, log = _run([ninja, "-C", str(folder), "-k", "0"])
        return code == 0, log, library
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(_run, objects.values()))
    if not any(code for code, _ in results):
        results.append(_run(link))
    return not any(code for code, _ in results), "\n".join(log for _, log in results), library


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock among processes; the system frees it however a process ends."""
    import fcntl  # not on Windows, where nothing is built

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"fusedformer: {text}", file=sys.stderr, flush=True)


def build(*, again: bool = False, retry: bool = False) -> Path:
    """The library, from the cache or built into it.

    Args:
        again: compile even if it is there.
        retry: compile even if that failed lately.

    Raises:
        BuildError: it cannot be built; the message is one line.
    """
    if not sources():
        raise BuildError(f"there are no C++ sources in {SOURCES}")
    compiler = find_compiler()
    cache = cache_folder()
    stem = f"cpu-{_key(compiler)}"
    library = cache / f"{stem}.so"
    if library.is_file() and not again:
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{stem}.lock"):
            if again or not library.is_file():  # else another process has built it meanwhile
                _build_locked(compiler, library, again or retry)
    except OSError as error:
        raise BuildError(f"the cache cannot be written ({error})") from error
    return library


def _build_locked(compiler: Compiler, library: Path, retry: bool) -> None:
    log = library.with_suffix(".log")
    if not retry and log.is_file() and 0 <= time.time() - log.stat().st_mtime < RETRY_SECONDS:
        raise BuildError(f"its compile failed lately (see {log}; `fusedformer build` tries again)")
    for left_over in library.parent.glob(
        f"{library.stem}.building-*"
    ):  # by a build that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{library.stem}.building-", dir=library.parent))
    _say(f"building the CPU kernels, once, into {library.parent}")
    start = time.monotonic()
    try:
        fine, said, built = _compile(compiler, folder)
        if not fine:
            log.write_text(said)
            raise BuildError(f"its compile failed (see {log})")
        built.replace(library)
        log.unlink(missing_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _say(f"built the CPU kernels in {time.monotonic() - start:.0f} s")
