"""The timing harness: order, samples and failures; no test depends on how fast anything is."""

import time

import pytest
import torch

from fusedformer.benchmarks import timing


class CountingClock:
    """Every call takes one millisecond more than the one before."""

    def __init__(self):
        self.now = 0.0

    def measure(self, call):
        self.now += 1
        return call(), self.now


def test_rounds_interleave_and_rotate():
    order = []
    calls = {
        name: (
            lambda name=name: order.append(name),
            lambda out, name=name: order.append(name + "'"),
        )
        for name in "abc"
    }
    found = timing.time_interleaved(calls, CountingClock(), seconds=60, max_rounds=3, warmup=1)
    assert order[:6] == ["a", "a'", "b", "b'", "c", "c'"]  # warm-up
    rounds = [name for name in order[6:] if len(name) == 1]
    assert rounds == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert found["a"] == {"forward_ms": [1, 11, 15], "backward_ms": [2, 12, 16]}


def test_backward_gets_what_forward_returned():
    got = []
    timing.time_interleaved(
        {"a": (lambda: 42, got.append)}, timing.WallClock(), seconds=0, warmup=0
    )
    assert got == [42]


def test_time_ends_the_rounds():
    calls = {"a": (lambda: time.sleep(0.02), lambda out: None)}
    found = timing.time_interleaved(calls, timing.WallClock(), seconds=0.05, max_rounds=100)
    assert 1 <= len(found["a"]["forward_ms"]) < 10
    assert min(found["a"]["forward_ms"]) >= 20


@pytest.mark.parametrize("fails_at", [0, 2])
def test_one_that_raises_stops_no_other(fails_at):
    count = iter(range(100))

    def fragile():
        if next(count) == fails_at:
            raise RuntimeError("no")

    calls = {"bad": (fragile, lambda out: None), "good": (lambda: 1, lambda out: None)}
    found = timing.time_interleaved(calls, CountingClock(), seconds=60, max_rounds=4)
    assert str(found["bad"]["error"]) == "no"
    assert len(found["good"]["forward_ms"]) == 4


def test_summary():
    found = timing.summary([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (found["median"], found["p20"], found["p80"]) == (3.5, 2.0, 5.0)
    assert timing.summary([7.0])["median"] == 7.0


@pytest.mark.gpu
def test_cuda_clock_counts_the_gpu_not_the_host():
    x = torch.randn(4096, 4096, device="cuda")
    clock = timing.clock_for("cuda")
    calls = {"a": (lambda: (time.sleep(0.0), x @ x)[1], lambda out: None)}
    found = timing.time_interleaved(calls, clock, seconds=1)
    # 137 GFLOP in float32: no GPU does that in 0.1 ms or needs a second.
    assert 0.1 < timing.summary(found["a"]["forward_ms"])["median"] < 1000
