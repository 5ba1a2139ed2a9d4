"""Stands in for worker processes: runs calls here, or fails as a process would."""

import contextlib

from fusedformer.benchmarks import workers
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
