"""What is measured of one implementation of an op. These functions run inside worker processes."""

import functools
import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch

from fusedformer.benchmarks import memory, timing, workers
from fusedformer.benchmarks.ops import attention, common
from fusedformer.benchmarks.ops.common import Held, Op
from fusedformer.benchmarks.ops.registry import OPS

# A result is wrong when its error is over this many times that of the formula in PyTorch, in the
# same dtype, plus one ulp: a decimal digit is lost.
WRONG = 10.0

# Sets of inputs that calls take in turn: as many as fit in this, at most so many.
_SETS_BYTES = 2**30
_MOST_SETS = 4


def use_isa(isa: str) -> None:
    """Holds this project's C++ kernels in this process to an instruction set; "" is the best."""
    if isa:
        from fusedformer.kernels import native

        path, reason = native.library()
        if path is None:
            raise RuntimeError(reason)
        torch.ops.fusedformer_native.set_isa(isa)


def _quietly(function: Callable) -> Callable:
    """The row says what warnings would."""

    @functools.wraps(function)
    def inner(*args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args)

    return inner


@_quietly
def look(op_name: str, impls: list[str], case: Any) -> "tuple[dict[str, str | None], int | None]":
    """Why each implementation cannot take a problem, or None; and the bytes to be had."""
    op = OPS[op_name]
    return {name: refusal(op, name, case) for name in impls}, memory.available(case.device)


def refusal(op: Op, name: str, case: Any) -> "str | None":
    """Why an implementation cannot take a problem here, or None."""
    impl = op.impls[name]
    return impl.refuses(case) or (common.no_compiler() if impl.compiles else None)


def label(op: Op, impl: str, case: Any, backends: list[str], held: Held) -> str:
    """What the rows call an implementation: its name, and what it ran on."""
    if impl == "fused":
        # The reference is PyTorch's own ops, so it is never called fused.
        if backends == ["reference"]:
            return "reference (not fused)"
        return f"fused ({', '.join(backends)})"
    if op is attention.OP and impl == "sdpa":
        mask = None
        if case.padded:
            mask = torch.empty((), dtype=torch.bool, device=case.device).expand(
                case.batch, 1, case.seq, case.seq
            )
        query, key, value, *_ = held.args
        return f"torch SDPA ({attention.sdpa_backend(query, key, value, case, mask)})"
    return impl


def _steps(function: Callable, held: Held, mode: str) -> tuple[Callable, Callable]:
    """(forward, backward); in mode "fwd" nothing requires a gradient, as at inference."""
    if mode == "fwd":
        args = [tensor.detach() for tensor in held.args]
        return functools.partial(function, *args), lambda out: None
    return functools.partial(function, *held.args), common.backward_of(held)


@_quietly
def peak_memory(op_name: str, impl: str, case: Any, mode: str, isa: str) -> dict:
    """Peak bytes of one call beyond its inputs.

    Returns:
        {"bytes", "baseline_bytes"}, None where not measurable; and "label", what ran.
    """
    use_isa(isa)
    op = OPS[op_name]
    if case.device == "cpu":
        memory.return_freed_blocks()
    make = op.impls[impl].make
    # Starts thread pools and pages code in; a compiler must see the size itself.
    warm = case if op.impls[impl].compiles else op.tiny(case)
    forward, backward = _steps(make(warm), op.inputs(warm, 0), mode)
    backward(forward())
    del forward, backward
    gc.collect()
    held = op.inputs(case, 0)
    forward, backward = _steps(make(case), held, mode)
    meter = memory.PeakMeter(case.device)
    with common.backends_seen() as backends:
        out = forward()
    grads = backward(out)
    used = meter.extra()
    del out, grads
    return {
        "bytes": used,
        "baseline_bytes": meter.baseline,
        "label": label(op, impl, case, backends, held),
    }


def _error_case(op: Op, impl: str, case: Any) -> Any:
    case = op.checked(case)
    # The masks of other implementations cannot be drawn again: they are compared without.
    return case if impl == "fused" else case.at(dropout_p=0.0)


@_quietly
def error(op_name: str, impl: str, case: Any, mode: str, isa: str) -> dict:
    """Relative errors of an implementation against float64.

    Returns:
        {"forward", "backward" (None in mode "fwd")} and "case", the fields in which the problem
        compared differs from ``case``.
    """
    use_isa(isa)
    op = OPS[op_name]
    compared = _error_case(op, impl, case)
    held = op.inputs(compared, 1)
    seed = 1 if compared.dropout_p else None
    make = op.impls[impl].make
    function = make(compared) if seed is None else op.seeded(compared, seed)
    forward, backward = _steps(function, held, mode)
    # An implementation may overwrite its arguments.
    kept = Held([t.detach().clone().requires_grad_(t.requires_grad) for t in held.args], held.grad)
    out = forward()
    found = op.compare(compared, kept, out, backward(out), seed)
    before, after = case.as_dict(), compared.as_dict()
    return {
        "forward": found["forward"],
        "backward": found.get("backward"),
        "case": {name: value for name, value in after.items() if value != before[name]},
    }


@_quietly
def limits(op_name: str, case: Any, mode: str) -> dict:
    """The errors over which a result is wrong; see WRONG. {"forward", "backward"}."""
    eager = OPS[op_name].eager
    found = error(op_name, eager, case.at(**one_head(case)), mode, "")
    eps = torch.finfo(common.DTYPES[case.dtype]).eps
    return {
        part: None if found[part] is None else WRONG * (found[part] + eps)
        for part in ("forward", "backward")
    }


def one_head(case: Any) -> dict:
    """Changes that leave attention one head of keys, which is all that its errors look at."""
    if not isinstance(case, attention.Case):
        return {}
    return {"batch": 1, "heads": case.group, "kv_heads": 1}


def verdict(found: dict, limit: dict) -> "str | None":
    """Why errors are those of a wrong result, or None."""
    for part in ("forward", "backward"):
        # Written so that a NaN is wrong.
        if found[part] is not None and not found[part] <= limit[part]:
            return f"relative error of the {part} {found[part]:.1e}, over {limit[part]:.1e}"
    return None


@_quietly
def times(
    op_name: str,
    impls: list[str],
    case: Any,
    mode: str,
    isa: str,
    host: bool,
    seconds: float,
    min_rounds: int,
    max_rounds: int,
) -> dict[str, workers.Outcome]:
    """Milliseconds of implementations that take turns; see timing.

    Args:
        host: of the calling thread, not of the GPU.

    Returns:
        implementation -> outcome, whose value is {"ms": [...]}, one sample a round.
    """
    use_isa(isa)
    op = OPS[op_name]
    first = op.inputs(case, 0)
    size = sum(t.nbytes for t in (*first.args, first.grad))
    count = 1 if host else max(1, min(_MOST_SETS, _SETS_BYTES // size))
    sets = [first, *(op.inputs(case, seed) for seed in range(1, count))]
    found = timing.time_interleaved(
        {impl: _sample(op.impls[impl].make(case), sets, mode) for impl in impls},
        timing.clock_for(case.device, host),
        seconds=seconds,
        min_rounds=min_rounds,
        max_rounds=max_rounds,
        warmup=2,
    )
    return {
        impl: workers.failure(result["error"])
        if "error" in result
        else workers.Outcome(workers.OK, result)
        for impl, result in found.items()
    }


def _sample(function: Callable, sets: list[Held], mode: str) -> timing.Sample:
    steps = [_steps(function, held, mode) for held in sets]
    if mode == "bwd":
        return timing.backward_alone(steps)
    if mode == "fwd":
        return timing.whole([forward for forward, _ in steps])

    def both(forward: Callable, backward: Callable) -> Any:
        return backward(forward())

    return timing.whole([functools.partial(both, *step) for step in steps])
