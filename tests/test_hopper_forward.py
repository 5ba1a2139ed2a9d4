"""Attention's forward for Hopper, run on the host by the emulator, against float64."""

import ctypes

import attention_cases as cases
import hopper_calls
import pytest
import torch
from bounds import assert_within_bound

pytestmark = pytest.mark.skipif(
    hopper_calls.COMPILER is None, reason="there is no C++ compiler here"
)

TILES = (64, 96, 128, 192, 256)
PLAIN = {
    "dtype": torch.bfloat16, "batch": 1, "heads": (1, 1), "queries": 128, "keys": 128, "dim": 64,
    "causal": False, "mask": None, "lengths": False, "p": 0.0, "scale": None, "offsets": None,
    "layout": "bnhd", "grads": "out",
}  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """library(dim): the kernels of the smallest tile that takes it."""
    folder, built = tmp_path_factory.mktemp("forward"), {}

    def build(dim):
        tile = next(tile for tile in TILES if dim <= tile)
        if not built:
            built["emulator"] = hopper_calls.build_emulator(folder)
        if tile not in built:
            path = folder / f"forward{tile}.so"
            built[tile] = hopper_calls.build_driver(
                "forward_main.cpp", tile, path, built["emulator"]
            )
        return built[tile]

    return build


def forward(library, tensors, options, *, seed=0, grid=2, resident=1):
    """(O, LSE) as the kernel leaves them. seed: of the emulator's events; grid: of CTAs."""
    query = tensors[0]
    out, lse = hopper_calls.poisoned(query), torch.full(query.shape[:3], torch.nan)
    call, _alive = hopper_calls.attention_call(tensors, options, out, lse)
    error = ctypes.create_string_buffer(2000)
    failed = library.forward(
        ctypes.byref(call), grid, resident, ctypes.c_uint64(seed), error, ctypes.c_size_t(2000)
    )
    assert not failed, error.value.decode()
    return out, lse


def check(library, case, **how):
    """O and LSE of a case against float64."""
    tensors, options, _ = cases.make_inputs(case)
    (truth, true_lse), (eager, eager_lse) = (
        cases.plain(*(t.to(dtype) for t in tensors), **options)
        for dtype in (torch.float64, case["dtype"])
    )
    poisoned = cases.poison(tensors, options["key_lengths"])
    out, lse = forward(library(case["dim"]), poisoned, options, **how)
    assert_within_bound("out", out, eager, truth)
    assert_within_bound("lse", lse, eager_lse, true_lse)


def test_one_tile(library):
    check(library, PLAIN)
