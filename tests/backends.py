"""The backends that tests compare, on the device where tests make their tensors."""

import itertools

import pytest
import torch

import fusedformer
from fusedformer.kernels import native

# The C++ kernels run on the CPU, so not beside Triton's where there is a GPU; without a compiler
# they run nowhere (tests/test_native.py asks why).
_CPU = not torch.cuda.is_available() and native.library()[1] is None
BACKENDS = ("reference", "triton", "cpu") if _CPU else ("reference", "triton")
ROW_BACKENDS = BACKENDS
# For what is the same code up to the choice of the backend: one, and with the slow tests the rest.
ONE_BACKEND = (BACKENDS[-1], *(pytest.param(n, marks=pytest.mark.slow) for n in BACKENDS[:-1]))

# Why the backend "cuda" cannot run here, or None; asking builds nothing. It takes attention in 16
# bits without masks, so tests of its own call it (tests/test_cuda_attention.py).
CUDA_REASON = fusedformer.available_backends("attention", "cuda")["cuda"]
needs_hopper = pytest.mark.skipif(CUDA_REASON is not None, reason=f"cuda: {CUDA_REASON}")


def pairs(which: int, backends: tuple = BACKENDS) -> list[tuple[str, str]]:
    """Backends of forward and backward, by forward: all, but for one in the interpreter.

    There Triton's backward takes nearly all the time; of the forwards that are not Triton's, each
    comes before it in every other case. Their numbers are ``which``.
    """
    found = list(itertools.product(backends, backends))
    others = [name for name in backends if name != "triton"]
    if "cpu" in backends and "triton" in backends:
        found.remove((others[which % len(others)], "triton"))
    return found
