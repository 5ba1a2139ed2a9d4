"""How long calls take: one clock a device, implementations interleaved in rounds, medians.

On a CPU the clock is the wall; on a GPU it is a pair of CUDA events, with the L2 cache overwritten
before each call. Every round runs each implementation once, in rotated order, so that a slow phase
of the machine falls on all of them alike; ratios within one run mean more than milliseconds.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
Backward = Callable[[Any], Any]

# Twice the largest L2 cache of today's chips (B200: 126 MB).
_FLUSH_BYTES = 256 * 2**20

# A sample on a CPU lasts at least this long: shorter calls are repeated within it.
_SAMPLE_MS = 1.0
_MOST_REPEATS = 1000


class WallClock:
    """Milliseconds of wall time of calls that return when they are done."""

    def measure(self, call: Call) -> tuple[Any, float]:
        """The call's result and its time in milliseconds."""
        start = time.perf_counter()
        result = call()
        return result, (time.perf_counter() - start) * 1e3

    def repeats(self, milliseconds: float) -> int:
        """How many calls of this length make one sample."""
        return min(_MOST_REPEATS, max(1, math.ceil(_SAMPLE_MS / max(milliseconds, 1e-6))))


class CudaClock:
    """Milliseconds between CUDA events around a call, from a cold L2 cache."""

    def __init__(self) -> None:
        self._scratch = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def measure(self, call: Call) -> tuple[Any, float]:
        """The call's result and its time in milliseconds."""
        # Several fills: while the GPU is at them the host runs ahead and queues the call, so that
        # the events do not count the host's own launch time.
        for _ in range(8):
            self._scratch.zero_()
        self._start.record()
        result = call()
        self._end.record()
        self._end.synchronize()
        return result, self._start.elapsed_time(self._end)

    def repeats(self, milliseconds: float) -> int:
        """One: a second call would find the cache warm."""
        return 1


class HostClock(WallClock):
    """Milliseconds that a GPU call keeps the host busy: the queue is empty before it."""

    def measure(self, call: Call) -> tuple[Any, float]:
        """The call's result and the time until it returned, in milliseconds."""
        torch.cuda.synchronize()
        return super().measure(call)


Clock = WallClock | CudaClock
# Takes one sample: what it measured, by name, in milliseconds.
Sample = Callable[[Clock], dict[str, float]]


def clock_for(device: str, host: bool = False) -> Clock:
    """The clock of a device type, "cpu" or "cuda"; with ``host`` that of the calling thread."""
    if device != "cuda":
        return WallClock()
    return HostClock() if host else CudaClock()


def forward_then_backward(forward: Call, backward: Backward) -> Sample:
    """Samples "forward_ms" and "backward_ms", one after the other, each timed alone."""

    def sample(clock: Clock) -> dict[str, float]:
        out, forward_ms = clock.measure(forward)
        _, backward_ms = clock.measure(functools.partial(backward, out))
        return {"forward_ms": forward_ms, "backward_ms": backward_ms}

    return sample


def backward_alone(pairs: Sequence[tuple[Call, Backward]]) -> Sample:
    """Samples "ms" of the backward; its forward runs outside the clock. Pairs take turns."""
    turns = itertools.cycle(pairs)

    def sample(clock: Clock) -> dict[str, float]:
        forward, backward = next(turns)
        return {"ms": clock.measure(functools.partial(backward, forward()))[1]}

    return sample


def whole(calls: Sequence[Call]) -> Sample:
    """Samples "ms" of one call; calls, one for each set of inputs, take turns.

    A call far shorter than a clock can tell is repeated within its sample, which is then the mean.
    """
    turns = itertools.cycle(calls)
    seen: list[float] = []  # single calls; the first may compile, so the second counts

    def sample(clock: Clock) -> dict[str, float]:
        repeats = clock.repeats(min(seen)) if len(seen) == 2 else 1
        if repeats == 1:
            _, milliseconds = clock.measure(next(turns))
            if len(seen) < 2:
                seen.append(milliseconds)
            return {"ms": milliseconds}

        def several() -> None:
            for _ in range(repeats):
                next(turns)()

        return {"ms": clock.measure(several)[1] / repeats}

    return sample


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile (0 to 1) of samples, interpolated between neighbours."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def summary(samples: list[float]) -> dict:
    """Median and 20/80 percentiles of samples (their unit), with the samples themselves."""
    return {
        "median": quantile(samples, 0.5),
        "p20": quantile(samples, 0.2),
        "p80": quantile(samples, 0.8),
        "samples": samples,
    }


def time_interleaved(
    samples: Mapping[str, Sample],
    clock: Clock,
    *,
    seconds: float,
    min_rounds: int = 1,
    max_rounds: int = 20,
    warmup: int = 1,
) -> dict[str, dict]:
    """Times several implementations, interleaved.

    Args:
        samples: name -> what takes one sample of it.
        clock: see clock_for().
        seconds: rounds go on until this much time is spent (warm-up not counted).
        min_rounds, max_rounds: bounds on the number of rounds, whatever the time.
        warmup: samples of each implementation that are thrown away before the first round.

    Returns:
        name -> {"forward_ms": [...], ...}, one sample a round, or {"error": exception}: one that
        raises is left out of further rounds and stops no other.
    """
    found: dict[str, dict] = {name: {} for name in samples}
    for name, sample in samples.items():
        try:
            for _ in range(warmup):
                sample(clock)
        except Exception as error:
            found[name] = _failed(error)
    order = [name for name in samples if "error" not in found[name]]
    start = time.perf_counter()
    for done in range(max_rounds):
        if not order or (done >= min_rounds and time.perf_counter() - start > seconds):
            break
        for name in list(order):
            try:
                for what, milliseconds in samples[name](clock).items():
                    found[name].setdefault(what, []).append(milliseconds)
            except Exception as error:
                found[name] = _failed(error)
                order.remove(name)
        order = order[1:] + order[:1]
    return found


def _failed(error: Exception) -> dict:
    # A traceback keeps the tensors of its frames, which the other implementations may need.
    return {"error": error.with_traceback(None)}
