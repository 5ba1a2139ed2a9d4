"""What is measured at one point of a sweep. These functions run inside worker processes."""

import contextlib
import functools
import warnings

import torch

from fusedformer.benchmarks import environment, memory, providers, timing, workers
from fusedformer.benchmarks.ops import attention, common
from fusedformer.benchmarks.ops.attention import Case

# Starts thread pools and pages code in without touching memory that would count.
_TINY = 32


def describe(device: str) -> dict:
    """The environment as this process sees it; see environment.describe()."""
    return environment.describe(device)


def _warm(impl: str, case: Case) -> None:
    small = case.at(seq=min(_TINY, case.seq))
    forward, backward = providers.call(impl, small, attention.inputs(small))
    backward(forward())


def look(impls: list[str], case: Case) -> "tuple[dict[str, str], int | None]":
    """What is known before a case runs: the backend of each implementation, the bytes to be had."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the row says what the warning would
        size = (case.batch, case.heads, case.seq, case.head_dim)
        dtype = common.DTYPES[case.dtype]
        # Never filled: choosing a backend looks at shapes alone.
        like = torch.empty(size, dtype=dtype, device=case.device, requires_grad=True)
        backends = {impl: providers.backend(impl, case, [like] * 3) for impl in impls}
    return backends, memory.available(case.device)


def peak_memory(impl: str, case: Case) -> tuple[dict, dict]:
    """Peak bytes of a forward and of a forward with its backward, beyond the inputs.

    Returns:
        {"forward_bytes", "training_bytes", "baseline_bytes"}, None where not measurable, and
        {"forward_ms", "backward_ms"} of that one run by the wall clock.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case.device == "cpu":
            memory.return_freed_blocks()
        held = attention.inputs(case)
        _warm(impl, case)
        forward, backward = providers.call(impl, case, held)
        clock = timing.WallClock()
        meter = memory.PeakMeter(case.device)
        out, forward_ms = clock.measure(forward)
        forward_bytes = meter.extra()
        grads, backward_ms = clock.measure(functools.partial(backward, out))
        training_bytes = meter.extra()
        del out, grads
    used = {
        "forward_bytes": forward_bytes,
        "training_bytes": training_bytes,
        "baseline_bytes": meter.baseline,
    }
    return used, {"forward_ms": forward_ms, "backward_ms": backward_ms}


def times(
    impls: list[str], case: Case, seconds: float, rounds: int, warmup: int
) -> dict[str, workers.Outcome]:
    """Forward and backward milliseconds of implementations interleaved; see timing.

    Args:
        seconds: how long to go on, at least one round.
        rounds: after how many rounds to stop in any case.
        warmup: full-size calls of each implementation before the first round.

    Returns:
        implementation -> outcome, whose value is {"forward_ms": [...], "backward_ms": [...]}.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = attention.inputs(case)
        for impl in impls:
            # One that fails does so again, and is recorded, when it is timed.
            with contextlib.suppress(Exception):
                _warm(impl, case)
        found = timing.time_interleaved(
            {
                impl: timing.forward_then_backward(*providers.call(impl, case, held))
                for impl in impls
            },
            timing.clock_for(case.device),
            seconds=seconds,
            max_rounds=rounds,
            warmup=warmup,
        )
    return {
        impl: workers.failure(result["error"])
        if "error" in result
        else workers.Outcome(workers.OK, result)
        for impl, result in found.items()
    }


def errors(impl: str, case: Case) -> "dict[str, float] | None":
    """Relative errors of an implementation; see providers.error_of()."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return providers.error_of(impl, case)
