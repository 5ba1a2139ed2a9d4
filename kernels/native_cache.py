"""Compiles a library of csrc/ into a cache. Knows no op and no compiler.

- A library is keyed by sources, flags and compiler. It appears in the cache under its name in one
  step, when it is whole: an interrupted build leaves nothing that could be loaded, and two
  processes that want it wait for one another.
- A failure has one line of reason; what the compiler said is in the log that the line names. A
  compile that failed is not tried again within a day, except by ``fusedformer build``.
"""

import contextlib
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# In a checkout beside kernels/; installed, as fusedformer/csrc.
SOURCES = Path(__file__).resolve().parent.parent / "csrc"

RETRY_SECONDS = 24 * 3600


class BuildError(RuntimeError):
    """Why there is no library: one line."""


@dataclass(frozen=True)
class Library:
    """How a library is made.

    Args:
        name: what the names of its files begin with.
        title: what the progress line calls it.
        key: of all that decides what it holds.
        compile: a folder -> for each object file there, the command that makes it.
        link: object files and a target -> the command that makes one of the other.
        command: what builds it on request.
    """

    name: str
    title: str
    key: str
    compile: Callable[[Path], dict[Path, list[str]]]
    link: Callable[[list[Path], Path], list[str]]
    command: str

    def path(self) -> Path:
        """Where it is once it is built."""
        return cache_folder() / f"{self.name}-{self.key}.so"


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


def files_key(root: Path, paths: Iterable[Path], *more: object) -> str:
    """Of the names, below root, and contents of files, and of what else has a repr."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    digest.update(repr(more).encode())
    return digest.hexdigest()[:16]


def key(*parts: object) -> str:
    """Of the reprs of some values."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


# --- A build in a folder --------------------------------------------------------------------------


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


def _compile(library: Library, folder: Path) -> tuple[bool, str, Path]:
    """Builds in ``folder``: whether it went well, what was said, and the library."""
    target = folder / "library.so"
    objects = library.compile(folder)
    link = library.link(list(objects), target)
    ninja = _ninja()
    if ninja is not None:
        (folder / "build.ninja").write_text(_ninja_file(objects, link, target))
        code, log = _run([ninja, "-C", str(folder), "-k", "0"])
        return code == 0, log, target
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(_run, objects.values()))
    if not any(code for code, _ in results):
        results.append(_run(link))
    return not any(code for code, _ in results), "\n".join(log for _, log in results), target


# --- The cache ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock among processes; the system frees it however a process ends."""
    import fcntl  # not on Windows, where nothing is built

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"fusedformer: {text}", file=sys.stderr, flush=True)


def failed_lately(library: Library) -> "str | None":
    """That its compile failed within the day, or None."""
    log = library.path().with_suffix(".log")
    if log.is_file() and 0 <= time.time() - log.stat().st_mtime < RETRY_SECONDS:
        return f"its compile failed lately (see {log}; `{library.command}` tries again)"
    return None


def build(library: Library, *, again: bool = False, retry: bool = False) -> Path:
    """The library, from the cache or built into it.

    Args:
        library: how it is made.
        again: compile even if it is there.
        retry: compile even if that failed lately.

    Raises:
        BuildError: it cannot be built; the message is one line.
    """
    target = library.path()
    if target.is_file() and not again:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if again or not target.is_file():  # else another process has built it meanwhile
                _build_locked(library, target, again or retry)
    except OSError as error:
        raise BuildError(f"the cache cannot be written ({error})") from error
    return target


def _build_locked(library: Library, target: Path, retry: bool) -> None:
    log = target.with_suffix(".log")
    if not retry and (reason := failed_lately(library)):
        raise BuildError(reason)
    for left_over in target.parent.glob(f"{target.stem}.building-*"):  # by a build that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{target.stem}.building-", dir=target.parent))
    _say(f"building {library.title}, once, into {target.parent}")
    start = time.monotonic()
    try:
        fine, said, built = _compile(library, folder)
        if not fine:
            log.write_text(said)
            raise BuildError(f"its compile failed (see {log})")
        built.replace(target)
        log.unlink(missing_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _say(f"built {library.title} in {time.monotonic() - start:.0f} s")
