"""The C++ kernels' own tests again, built with the address and undefined-behaviour sanitizers.

Masked AVX-512 accesses are not checked by g++; the same rows' ends are, in the other sets.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from backends import ROW_BACKENDS

ROOT = Path(__file__).resolve().parent.parent

# Before anything asks for the library.
BUILD = """
import sys
from fusedformer.kernels import native, native_build
checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
native_build.LEVELS = native_build.PORTABLE_LEVELS  # which compile soonest
native_build.FLAGS += checks
native_build.LINK_FLAGS += checks
path, error = native.library()
assert error is None, error
"""

TESTS = (
    BUILD
    + """
import pytest
sys.exit(pytest.main(["-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
)

# Ten rows of 8 columns in the memory of 70 numbers.
OVERRUN = (
    BUILD
    + """
import ctypes, torch
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
memory = (ctypes.c_float * 80).from_address(libc.malloc(280))
x = torch.frombuffer(memory, dtype=torch.float32).view(10, 8)
torch.ops.fusedformer_native.set_isa("portable")
native.dropout_fwd(x, torch.tensor(3), 0.5)
"""
)


def _runtimes() -> "list[str] | None":
    """g++'s sanitizers, which have to be loaded before Python is."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    names = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libubsan.so")
    ]
    paths = [done.stdout.strip() for done in names]
    return paths if all(map(os.path.isabs, paths)) else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_runtimes() is None, reason="needs g++ with its sanitizers"),
    pytest.mark.skipif("cpu" not in ROW_BACKENDS, reason="there is no C++ library here"),
]


def run(code: str, *args: str) -> subprocess.CompletedProcess:
    env = os.environ | {
        "LD_PRELOAD": " ".join(_runtimes() or []),
        # Python keeps what it allocated; torch frees by other names than it allocates by.
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0:alloc_dealloc_mismatch=0",
        "CXX": "g++",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, "-c", code, *args], cwd=ROOT, env=env, capture_output=True, text=True
    )


ROWS = ["test_native", "test_native_linear", "test_native_attention_decode"]


@pytest.mark.parametrize(
    ("files", "options"),
    [(ROWS, []), (["test_native_attention"], ["-m", "not slow"])],
    ids=["rows", "attention"],
)
def test_the_kernels(files, options):
    done = run(TESTS, *(f"tests/{file}.py" for file in files), *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_an_overrun_is_caught():
    done = run(OVERRUN)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
