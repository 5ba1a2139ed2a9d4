"""What of attention's cases the CUDA kernels take, and what they need."""

import pytest

import fusedformer
from fusedformer.kernels.cuda import attention as on_cuda

# Why the backend "cuda" cannot run here, or None; asking builds nothing.
REASON = fusedformer.available_backends("attention", "cuda")["cuda"]

needs_hopper = pytest.mark.skipif(REASON is not None, reason=f"cuda: {REASON}")


def taken(case: dict) -> dict:
    """The nearest case that the kernels take (its dtype is the caller's to choose)."""
    dim = min(on_cuda.MAX_DIM, (case["dim"] + 7) // 8 * 8)
    # TMA has neither a stride between the columns nor one of 0.
    layout = case["layout"] if case["layout"] in ("bhnd", "bnhd") else "bnhd"
    scale = None if case["scale"] is None else abs(case["scale"])
    return {**case, "dim": dim, "layout": layout, "scale": scale, "mask": None}
