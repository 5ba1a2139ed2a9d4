"""Stands in for worker processes, and rows as they would have measured them."""

import contextlib

from fusedformer.benchmarks import workers
from fusedformer.benchmarks.ops import attention
from fusedformer.benchmarks.workers import Outcome


class Inline(contextlib.nullcontext):
    """Runs every call in this process.

    Args:
        failures: implementation -> the outcome of whatever is asked of it.
        delay: called before each call.
    """

    def __init__(self, failures=None, before=lambda function, args: None):
        super().__init__(self)
        self.failures = failures or {}
        self.before = before

    def run(self, function, *args, timeout=None):
        self.before(function, args)
        for name, outcome in self.failures.items():
            if name in args:
                return outcome
        try:
            return Outcome(workers.OK, function(*args))
        except Exception as error:
            return workers.failure(error)


def row(impl, samples=None, **more):
    """A row of a small attention problem, with these milliseconds."""
    held = {
        "key": "k", "title": "t", "op": "attention", "mode": "fwd", "quantity": "time",
        "isa": None, "case": attention.Case(1, 2, 16, 8).as_dict(), "baseline": "sdpa", "goals": [],
        "flops": 2e9, "bytes": 1e6, "impl": impl, "label": impl, "version": None,
        "status": workers.OK, "reason": "",
    }  # fmt: skip
    if samples:
        held["ms"] = {"median": sorted(samples)[len(samples) // 2], "samples": samples}
        held["ms"] |= {"p20": min(samples), "p80": max(samples)}
    return held | more
