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

    def repeats(self, milliseconds):
        return 1


def test_rounds_interleave_and_rotate():
    order = []
    calls = {
        name: timing.forward_then_backward(
            lambda name=name: order.append(name),
            lambda out, name=name: order.append(name + "'"),
        )
        for name in "abc"
    }
    found = timing.time_interleaved(calls, CountingClock(), seconds=60, max_rounds=3, warmup=1)
    assert order[:6] == ["a", "a'", "b", "b'", "c", "c'"]  # warm-up
    rounds = [name for name in order[6:] if len(name) == 1]
    assert rounds == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert found["a"] == {"forward_ms": [7, 17, 21], "backward_ms": [8, 18, 22]}


def test_backward_gets_what_forward_returned():
    got = []
    for sample in (
        timing.forward_then_backward(lambda: 42, got.append),
        timing.backward_alone([(lambda: 43, got.append)]),
    ):
        timing.time_interleaved({"a": sample}, timing.WallClock(), seconds=0, warmup=0)
    assert got == [42, 43]


def test_time_ends_the_rounds():
    calls = {"a": timing.whole([lambda: time.sleep(0.02)])}
    found = timing.time_interleaved(calls, timing.WallClock(), seconds=0.05, max_rounds=100)
    assert 1 <= len(found["a"]["ms"]) < 10
    assert min(found["a"]["ms"]) >= 20


@pytest.mark.parametrize("fails_at", [0, 2])
def test_one_that_raises_stops_no_other(fails_at):
    count = iter(range(100))

    def fragile():
        if next(count) == fails_at:
            raise RuntimeError("no")

    calls = {"bad": timing.whole([fragile]), "good": timing.whole([lambda: 1])}
    found = timing.time_interleaved(calls, CountingClock(), seconds=60, max_rounds=4)
    assert str(found["bad"]["error"]) == "no"
    assert len(found["good"]["ms"]) == 4


def test_inputs_take_turns():
    order = []
    calls = [lambda name=name: order.append(name) for name in "ab"]
    sample = timing.whole(calls)
    timing.time_interleaved({"a": sample}, CountingClock(), seconds=60, max_rounds=3, warmup=2)
    assert order == ["a", "b", "a", "b", "a"]


def test_short_calls_are_repeated():
    """A call of 20 us, by a clock that counts calls: its sample is the mean of 50."""
    done = []

    class Clock(timing.WallClock):
        def measure(self, call):
            before = len(done)
            return call(), 0.02 * (len(done) - before)

    found = timing.time_interleaved(
        {"a": timing.whole([lambda: done.append(1)])}, Clock(), seconds=60, max_rounds=3, warmup=2
    )
    assert len(done) == 2 + 3 * 50
    assert found["a"]["ms"] == pytest.approx([0.02] * 3)


@pytest.mark.parametrize("milliseconds", [5, 50])
def test_a_call_of_known_cost_is_measured_right(monkeypatch, milliseconds):
    """By a clock that the call alone moves: a real one moves while others have the processor."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += milliseconds / 1e3

    found = timing.time_interleaved(
        {"a": timing.whole([call])}, timing.WallClock(), seconds=60, max_rounds=5
    )
    assert found["a"]["ms"] == pytest.approx([milliseconds] * 5)


def test_summary():
    found = timing.summary([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (found["median"], found["p20"], found["p80"]) == (3.5, 2.0, 5.0)
    assert timing.summary([7.0])["median"] == 7.0


@pytest.mark.gpu
def test_cuda_clock_counts_the_gpu_not_the_host():
    x = torch.randn(4096, 4096, device="cuda")
    clock = timing.clock_for("cuda")
    found = timing.time_interleaved({"a": timing.whole([lambda: x @ x])}, clock, seconds=1)
    # 137 GFLOP in float32: no GPU does that in 0.1 ms or needs a second.
    assert 0.1 < timing.summary(found["a"]["ms"])["median"] < 1000


@pytest.mark.gpu
def test_cuda_clock_of_a_known_cost():
    """A kernel that spins for so many cycles takes that long at the clock of the GPU."""
    cycles = 20_000_000
    calls = {
        name: timing.whole([lambda n=n: torch.cuda._sleep(n)])
        for name, n in (("one", cycles), ("two", 2 * cycles))
    }
    found = timing.time_interleaved(calls, timing.clock_for("cuda"), seconds=1)
    one, two = (timing.summary(found[name]["ms"])["median"] for name in calls)
    assert two == pytest.approx(2 * one, rel=0.1)
