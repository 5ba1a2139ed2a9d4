"""The builder of the C++ library: it gives a whole library, or a reason and the reference."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusedformer import cli
from fusedformer.kernels import native_build, native_cache

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)

# A library that takes a moment to compile instead of many seconds.
SMALL = """
import sys, pathlib
from fusedformer.kernels import native_build, native_cache
native_build.SOURCES = pathlib.Path(sys.argv[1])
try:
    print("path", native_build.build(again="again" in sys.argv, retry="retry" in sys.argv))
except native_build.BuildError as error:
    print("error", error)
"""


@pytest.fixture
def small(tmp_path):
    """Sources of a small library; (folder of the sources, environment with a cache of its own)."""
    sources = tmp_path / "csrc"
    (sources / "cpu").mkdir(parents=True)
    (sources / "cpu/ops.cpp").write_text(
        'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
    )
    name = "extern const int NAME(row); const int NAME(row) = 1;"
    macros = "#define JOIN_(a, b) a##_##b\n#define JOIN(a, b) JOIN_(a, b)\n"
    macros += "#define NAME(a) JOIN(a, FUSEDFORMER_ISA)\n"
    (sources / "cpu/row_kernels.cpp").write_text(macros + name + "\n")
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    return sources, env


def start(code: str, *args: object, env: dict) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[str, str, str]:
    """Its verdict ("path" or "error"), the rest of that line, and what it said on stderr."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    verdict, _, rest = out.strip().partition(" ")
    return verdict, rest, err


def answers(library: str) -> bool:
    code = f"import ctypes; assert ctypes.CDLL({library!r}).answer() == 42"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


def fake_compiler(tmp_path: Path, script: str) -> str:
    path = tmp_path / "fake-c++"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo fake 1 && exit\n{script}\n')
    path.chmod(0o755)
    return str(path)


def in_cache(env: dict) -> list[str]:
    folder = Path(env["XDG_CACHE_HOME"]) / "fusedformer"
    return sorted(path.suffix for path in folder.iterdir() if path.suffix != ".lock")


def test_two_processes_at_once(small):
    sources, env = small
    found = [finish(p) for p in [start(SMALL, sources, env=env) for _ in range(2)]]
    assert [verdict for verdict, *_ in found] == ["path", "path"]
    assert found[0][1] == found[1][1]
    assert answers(found[0][1])
    assert in_cache(env) == [".so"]
    # One of them built, and said so.
    assert sorted("building" in err for *_, err in found) == [False, True]


def test_without_ninja(small):
    sources, env = small
    code = SMALL.replace("try:", "native_cache._ninja = lambda: None\ntry:")
    verdict, library, _ = finish(start(code, sources, env=env))
    assert verdict == "path"
    assert answers(library)


@pytest.fixture
def here(small, monkeypatch, capfd):
    """Builds the small library in this process: (its path or the error, whether it was built)."""
    sources, env = small
    monkeypatch.setattr(native_build, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", env["XDG_CACHE_HOME"])

    def build(**options):
        try:
            found = native_build.build(**options)
        except native_build.BuildError as error:
            found = str(error)
        return found, "building" in capfd.readouterr().err

    return build


def test_sources_and_flags_make_another_library(small, here, monkeypatch):
    first, _ = here()
    assert here(retry=True) == (first, False)
    assert here(again=True) == (first, True)
    (small[0] / "cpu/more.h").write_text("")
    second, built = here()
    assert built
    monkeypatch.setattr(native_build, "FLAGS", [*native_build.FLAGS, "-DMORE"])
    third, built = here()
    assert built
    assert len({first, second, third}) == 3


def test_a_build_killed_half_way(small, tmp_path):
    sources, env = small
    real = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    slow = fake_compiler(tmp_path, f'[ -e {tmp_path}/go ] || sleep 60\nexec {real} "$@"')
    env |= {"CXX": slow}
    process = start(SMALL, sources, env=env)
    for _ in range(600):
        cache = Path(env["XDG_CACHE_HOME"]) / "fusedformer"
        if list(cache.glob("*.building-*/build.ninja")) or list(cache.glob("*.building-*/*.o")):
            break
        time.sleep(0.1)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(cache.glob("*.so"))
    assert list(cache.glob("*.building-*"))
    (tmp_path / "go").touch()
    verdict, library, _ = finish(start(SMALL, sources, env=env))
    assert verdict == "path"
    assert answers(library)
    assert in_cache(env) == [".so"]


def test_a_failed_compile(here, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, 'echo "no such flag"; exit 1'))
    said, _ = here()
    assert "\n" not in said
    log = Path(said.partition("see ")[2].rstrip(")"))
    assert "no such flag" in log.read_text()
    # Not tried again at every start, but when asked to.
    said, built = here()
    assert "lately" in said
    assert "fusedformer build" in said
    assert not built
    assert here(retry=True)[1]
    os.utime(log, (0, 0))
    assert here()[1]


def test_the_command(small, monkeypatch, capsys):
    sources, env = small
    monkeypatch.setattr(native_build, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", env["XDG_CACHE_HOME"])
    assert cli.main(["build", "cpu"]) == 0
    assert answers(capsys.readouterr().out.strip())
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cli.main(["build", "cpu"]) == 2
    said = "fusedformer build: no C++ compiler found (looked for no-such-compiler on the PATH)\n"
    assert capsys.readouterr().err == said


# What a user meets: each op runs, on the reference, and the reason is there for who asks.
USE = """
import torch, fusedformer
x = torch.randn(4, 8, requires_grad=True)
fusedformer.dropout(x, 0.5).sum().backward()
fusedformer.layer_norm(x).sum().backward()
try:
    fusedformer.dropout(x, 0.5, backend="cpu")
except RuntimeError as error:
    print("error", error)
assert fusedformer.available_backends("dropout")["cpu"]
"""


def test_no_compiler(tmp_path):
    env = os.environ | {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    env.pop("CXX", None)
    verdict, said, _ = finish(start(USE, env=env | {"PYTHONPATH": str(ROOT)}))
    assert verdict == "error"
    assert "no C++ compiler found (looked for c++, g++, clang++ on the PATH)" in said


def test_a_cache_that_cannot_be_written(tmp_path):
    # A file where the folder should be: root may write to any folder.
    (tmp_path / "file").touch()
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "file"), "PYTHONPATH": str(ROOT)}
    verdict, said, _ = finish(start(USE, env=env))
    assert verdict == "error"
    assert "the cache cannot be written (" in said


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native_cache.cache_folder() == tmp_path / "fusedformer"
    # The specification says to ignore a relative path.
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert native_cache.cache_folder().is_absolute()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_kernels_define_nothing_that_another_file_could_use(tmp_path):
    """The linker keeps one copy of an inline function: it must not be one with AVX-512."""
    compiler = native_build.find_compiler()
    checked = 0
    for target, command in native_build.compile_commands(compiler, tmp_path).items():
        if "_kernels" not in target.name:
            continue
        subprocess.run(command, check=True, capture_output=True)
        symbols = subprocess.run(["nm", target], check=True, capture_output=True, text=True).stdout
        kinds = {line.split()[-2] for line in symbols.splitlines()}
        assert not kinds & set("WwVvu"), target.name
        checked += 1
    assert checked >= 2 * len(compiler.isas)
