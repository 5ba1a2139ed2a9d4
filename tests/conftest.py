"""Shared by all tests: where Triton runs, how many threads, which tests need a GPU."""

import ctypes
import os
import platform
from collections.abc import Iterator

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

if HAS_GPU:
    # Deterministic matrix products, for the tests that ask for them.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    # Read when a kernel is decorated, so before any test imports one.
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core; more threads would only fight over them.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture
def on_device() -> Iterator[None]:
    """Tensors are made where Triton's kernels run: on the GPU if there is one."""
    torch.manual_seed(0)
    torch.set_default_device("cuda" if HAS_GPU else "cpu")
    yield
    torch.set_default_device(None)


def _perturb_malloc(byte: int) -> None:
    """glibc's malloc fills what it gives with the complement of byte, what is freed with byte.

    Not where the address sanitizer's malloc has taken its place, which fills what it gives itself.
    """
    if platform.libc_ver()[0] == "glibc" and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        perturb = -6  # M_PERTURB of malloc.h
        assert ctypes.CDLL(None).mallopt(perturb, byte)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """What a kernel leaves unwritten, or reads before it is written, shows.

    Tensors from torch.empty hold NaN. So do in float16 the tensors and the scratch memory that C++
    takes past torch.empty; in float32 and bfloat16 these hold -1.7e38.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    _perturb_malloc(1)
    yield
    _perturb_malloc(0)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh_compiler() -> None:
    """Nothing that torch.compile kept from the tests before."""
    torch.compiler.reset()


@pytest.fixture(params=("portable", "avx2", "avx512", "avx512bf16"))
def isa(request):
    """Each instruction set that this CPU has, forced."""
    from fusedformer.kernels import native

    assert native.library()[1] is None
    ops = torch.ops.fusedformer_native
    if request.param not in ops.isas().split():
        pytest.skip(f"this CPU has no {request.param}")
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa("")


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """Four processes on the CPU, for Processes.run()."""
    from processes import Processes

    pool = Processes(4, tmp_path_factory.mktemp("processes"))
    yield pool
    pool.close()


@pytest.fixture
def alone(tmp_path) -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
