"""What is measured of one implementation of an op. These functions run inside worker processes."""

import functools
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
    return impl.refuses(case) or (common.no_compiler(case.device) if impl.compiles else None)


def label(op: Op, impl: str, case: Any, backends: list[str], held: Held) -> str:
    """What the rows call an implementation: its name, and what it ran on."""
    if common.ours(impl):
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
    args = [tensor.detach() for tensor in held.args] if mode == "fwd" else held.args
    _, has_backward = common.phases(mode)
    backward = common.backward_of(held) if has_backward else lambda out: None
    return functools.partial(function, *args), backward


@_quietly
def first(op_name: str, impl: str, case: Any, mode: str, isa: str) -> dict:
    """What is known of an implementation before it is timed.

    Returns:
        "label", what ran; "memory": the peak "bytes" of one call beyond its inputs, on a CPU in a
        process that ran nothing before, the bytes "returned" that are part of them, and the
        "baseline_bytes"; "error": "forward", "backward" and "case", the fields in which the problem
        compared differs. None where there is nothing to measure.
    """
    use_isa(isa)
    op = OPS[op_name]
    if case.device == "cpu":
        memory.return_freed_blocks()
    # Starts thread pools and pages code in; a compiler must see the size itself.
    warm = case if op.impls[impl].compiles else op.tiny(case)
    _run(op, impl, warm, mode, op.inputs(warm, 0))
    held = op.inputs(case, 0)
    # An implementation may overwrite its arguments.
    kept = held.copy()
    meter = memory.PeakMeter(case.device)
    with common.backends_seen() as backends:
        out, grads = _run(op, impl, case, mode, held)
    used = meter.extra()
    returned = sum(tensor.nbytes for tensor in (out, *(grads or ())))
    found: dict = {"forward": None}
    if op.compare is not None:
        compared = _error_case(op, impl, case)
        if compared == case:
            found = op.compare(case, kept, out, grads, _seed(case))
        else:
            del out, grads
            found = _error(op, impl, compared, mode)
        before, after = case.as_dict(), compared.as_dict()
        found["case"] = {name: value for name, value in after.items() if value != before[name]}
    return {
        "label": label(op, impl, case, backends, held),
        "memory": {"bytes": used, "returned": returned, "baseline_bytes": meter.baseline},
        "error": {"backward": None} | found,
    }


def _seed(case: Any) -> "int | None":
    """The dropout seed of this project's calls whose errors are taken."""
    return 1 if case.dropout_p else None


def _run(
    op: Op, impl: str, case: Any, mode: str, held: Held
) -> "tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]":
    """Output and gradients of one call, under a seed that compare() knows."""
    function = op.impls[impl].make(case)
    if common.ours(impl) and case.dropout_p:
        function = op.seeded(case, _seed(case), common.forced_backend(impl))
    forward, backward = _steps(function, held, mode)
    out = forward()
    return out, backward(out)


def _error_case(op: Op, impl: str, case: Any) -> Any:
    case = op.checked(case)
    # The masks of other implementations cannot be drawn again: they are compared without.
    return case if common.ours(impl) else case.at(dropout_p=0.0)


def _error(op: Op, impl: str, case: Any, mode: str) -> dict:
    """Relative errors against float64, "forward" and, but in mode "fwd", "backward"."""
    held = op.inputs(case, 1)
    kept = held.copy()
    assert op.compare is not None
    return op.compare(case, kept, *_run(op, impl, case, mode, held), _seed(case))


@_quietly
def limits(op_name: str, case: Any, mode: str) -> dict:
    """The errors over which a result is wrong, by part; see WRONG."""
    op = OPS[op_name]
    if op.compare is None:
        return {}
    compared = _error_case(op, op.eager, case.at(**one_head(case)))
    found = _error(op, op.eager, compared, mode)
    eps = torch.finfo(common.DTYPES[case.dtype]).eps
    return {part: WRONG * (value + eps) for part, value in found.items()}


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
    count = 1 if host or not first.args else max(1, min(_MOST_SETS, _SETS_BYTES // size))
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

    def both(forward: Callable, backward: Callable) -> Any:
        return backward(forward())

    return timing.whole([functools.partial(both, *step) for step in steps])
