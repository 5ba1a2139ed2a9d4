"""Attention read through tensor descriptors, and with specialized warps: the same numbers.

No configuration asks for either by itself; these tests do, for every kernel that has them.
"""

import dataclasses

import attention_cases as cases
import pytest
import recorded
import torch
from pairwise import describe
from test_attention import _scores, check_pairs

from fusedformer import aot

pytest.importorskip("triton")

pytestmark = pytest.mark.usefixtures("on_device", "poisoned_memory")

# What TMA has to get right: ends of the keys that hold NaN, head dimensions between powers of two,
# one row, strides. On a GPU warps are specialized in 16 bits without masks.
CHOSEN = [case for case in cases.CASES if case["mask"] is None]
_ODD = [case for case in CHOSEN if case["lengths"] and case["dim"] in (13, 100)]
FAST = sorted(_ODD, key=_scores)[:1]
ON_GPU = [case for case in CHOSEN if case["dim"] <= 128 and len(set(case["heads"])) == 1]

@pytest.fixture(params=["descriptors", "specialized"])
def way(request, monkeypatch):
    """Lets every configuration have descriptors, and specialized warps if asked."""
    from fusedformer.kernels.triton import attention as backend

    on_gpu = request.node.get_closest_marker("gpu")
    if request.param == "specialized" and torch.cuda.is_available() and not on_gpu:
        pytest.skip("test_numbers_on_gpu has the calls that compile so")

    def changed(config):
        def found(*args):
            known = dataclasses.replace(config(*args), descriptors=True)
            if request.param == "descriptors":
                return known
            # Tiles that compile for sm_90 so, in 16 bits; with dropout in Triton 3.6, too.
            return dataclasses.replace(known, block_m=64, block_n=64, warps=4, specialized=True)

        return found

    for name in ("forward", "key_value_grads", "query_grads"):
        monkeypatch.setattr(backend, f"{name}_config", changed(getattr(backend, f"{name}_config")))
    return request.param


@pytest.mark.parametrize("case", FAST, ids=describe)
def test_numbers(case, way):
    check_pairs(case, backends=("triton",))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c for c in cases.CASES if _scores(c) < 60_000][::8], ids=describe
)
def test_numbers_of_more(case, way):
    check_pairs(case, backends=("triton",))


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU[::2], ids=describe)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_on_gpu(case, dtype, way):
    check_pairs({**case, "dtype": dtype}, "cuda", backends=("triton",))


def test_what_does_not_start_on_16_bytes_is_copied():
    """Memory that torch did not allocate may start anywhere; offsets within it do not tell."""
    from fusedformer.kernels.triton import attention as backend

    memory = bytearray(2 * 4 * 64 + 32)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    for shift in (0, 2):
        tensor = torch.frombuffer(
            memory, dtype=torch.float16, count=4 * 64, offset=-start % 16 + shift
        ).view(1, 1, 4, 64)
        readable, _ = backend._readable(tensor)
        assert readable.data_ptr() % 16 == 0
        assert (readable is tensor) == (shift == 0)
        assert torch.equal(readable, tensor.to(readable.device))


@pytest.mark.slow
@pytest.mark.parametrize("config", [(128, 64, 8, 2, True), (64, 64, 4, 2, True, True)], ids=str)
def test_they_take_effect(config):
    """On sm_90: no pointer in a loop; warps of their own that read."""
    specialized = len(config) == 6
    with aot.worker_pool(1) as pool:
        text, ptx = pool.submit(recorded.attention_forward, config).result()
    assert "ttng.async_tma_copy_global_to_local" in text
    assert "cp.async.bulk.tensor" in ptx
    assert "cp.async.cg" not in ptx
    assert "wgmma.mma_async" in ptx
    assert text.count("ttg.warp_specialize(") == specialized
