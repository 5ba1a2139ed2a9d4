"""launch(): what it gives the driver is what Triton's own launch gives, found once."""

import pytest

pytest.importorskip("triton")
import launched

from fusedformer import aot
from fusedformer.kernels.triton import launch


@pytest.fixture(scope="module")
def seen():
    with aot.worker_pool(1) as pool:
        return pool.submit(launched.launches).result()


def test_launches_are_those_of_triton(seen):
    for name, ((own, *ours), _) in seen.items():
        assert len(ours) == 3
        assert all(launch == own for launch in ours), name


def test_a_launch_like_an_earlier_one_goes_past_triton(seen):
    """Only where a tensor lies, and as well aligned, is new in "elsewhere"."""
    ways = {name: count for name, (_, count) in seen.items()}
    assert ways.pop("elsewhere") == 0
    assert set(ways.values()) == {1}


def test_these_are_compiled_apart(seen):
    """Or nothing above could fail."""
    kernels = {name: own[2:4] for name, ((own, *_), _) in seen.items()}
    apart = ("first", "unaligned", "dtype", "none", "one", "constexpr", "warps")
    assert len({kernels[name] for name in apart}) == len(apart)


@pytest.mark.parametrize("number", [1, 2, 3, 5, 16, 17, 768, 1024, 50257, 2**30])
def test_whole_numbers_as_triton_has_them(number):
    triton = pytest.importorskip("triton")
    assert launch.power_of_2(number) == triton.next_power_of_2(number)
    for divisor in (1, 3, 16, 1000):
        assert launch.cdiv(number, divisor) == triton.cdiv(number, divisor)
