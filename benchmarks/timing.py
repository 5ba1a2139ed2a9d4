"""How long calls take: one clock a device, implementations interleaved in rounds, medians.

On a CPU the clock is the wall; on a GPU it is a pair of CUDA events, with the L2 cache overwritten
before each call. Every round runs each implementation once, in rotated order, so that a slow phase
of the machine falls on all of them alike; ratios within one run mean more than milliseconds.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], Any]
Backward = Callable[[Any], Any]

# Twice the largest L2 cache of today's chips (B200: 126 MB).
_FLUSH_BYTES = 256 * 2**20


class WallClock:
    """Milliseconds of wall time of calls that return when they are done."""

    def measure(self, call: Call) -> tuple[Any, float]:
        """The call's result and its time in milliseconds."""
        start = time.perf_counter()
        result = call()
        return result, (time.perf_counter() - start) * 1e3


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


def clock_for(device: str) -> "WallClock | CudaClock":
    """The clock of a device type, "cpu" or "cuda"."""
    return CudaClock() if device == "cuda" else WallClock()


def quantile(samples: list[float], q: float) -> float:
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
    calls: Mapping[str, tuple[Call, Backward]],
    clock: "WallClock | CudaClock",
    *,
    seconds: float,
    min_rounds: int = 1,
    max_rounds: int = 20,
    warmup: int = 1,
) -> dict[str, dict]:
    """Times forward and backward of several implementations, interleaved.

    Args:
        calls: name -> (forward, backward); backward takes what forward returned.
        clock: see clock_for().
        seconds: rounds go on until this much time is spent (warm-up not counted).
        min_rounds, max_rounds: bounds on the number of rounds, whatever the time.
        warmup: calls of each implementation before the first round.

    Returns:
        name -> {"forward_ms": [...], "backward_ms": [...]}, one sample a round, or
        {"error": exception}: one that raises is left out of further rounds and stops no other.
    """
    found: dict[str, dict] = {name: {"forward_ms": [], "backward_ms": []} for name in calls}
    for name, (forward, backward) in calls.items():
        try:
            for _ in range(warmup):
                backward(forward())
        except Exception as error:
            found[name] = _failed(error)
    order = [name for name in calls if "error" not in found[name]]
    start = time.perf_counter()
    for done in range(max_rounds):
        if not order or (done >= min_rounds and time.perf_counter() - start > seconds):
            break
        for name in list(order):
            forward, backward = calls[name]
            try:
                out, forward_ms = clock.measure(forward)
                _, backward_ms = clock.measure(functools.partial(backward, out))
                del out
            except Exception as error:
                found[name] = _failed(error)
                order.remove(name)
                continue
            found[name]["forward_ms"].append(forward_ms)
            found[name]["backward_ms"].append(backward_ms)
        order = order[1:] + order[:1]
    return found


def _failed(error: Exception) -> dict:
    # A traceback keeps the tensors of its frames, which the other implementations may need.
    return {"error": error.with_traceback(None)}
