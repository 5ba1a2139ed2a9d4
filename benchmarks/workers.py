"""Runs functions in other processes, so that a crash or a lack of memory is a result, not an end.

On a CPU every call gets a fresh process. Where the system can fork, it is forked from a server
that has imported torch and run nothing, which costs milliseconds instead of an import. CUDA cannot
be used across a fork and its start is slow: there, one spawned process serves all calls and is
replaced when it dies.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusedformer.benchmarks import memory

# The second is what torch.autograd.grad imports at its first call: a quarter of a second.
_PRELOAD = [
    "fusedformer.benchmarks.points",
    "fusedformer.benchmarks.measure",
    "torch.fx.experimental.symbolic_shapes",
]

# Seconds that a killed process gets to be gone.
_GONE_AFTER = 10.0

OK, OUT_OF_MEMORY, TOO_SLOW, FAILED = "ok", "out of memory", "too slow", "failed"


@dataclass(frozen=True)
class Outcome:
    """What came of a call: its value when status is "ok", else the reason in one line."""

    status: str
    value: Any = None
    reason: str = ""


def failure(error: BaseException) -> Outcome:
    """The outcome of a call that raised."""
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else ''}".strip(": ")
    # On a CPU torch raises a plain RuntimeError, known only by its text.
    lacks = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
    lacks = lacks or "can't allocate memory" in str(error)
    return Outcome(OUT_OF_MEMORY if lacks else FAILED, reason=reason)


def _serve(connection: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    memory.first_to_be_killed()
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            outcome = Outcome(OK, function(*args))
        except Exception as error:
            outcome = failure(error)
        broken = _context_is_broken()
        if outcome.status != OK and torch.cuda.is_initialized() and not broken:
            torch.cuda.empty_cache()  # pieces that the next call could not use
        connection.send((outcome, broken))


def _context_is_broken() -> bool:
    """Whether a kernel's fault has made every later call of this process to the GPU fail."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Workers:
    """Runs calls one at a time in other processes; a context manager.

    Args:
        fresh: a new process for every call; else one for all calls.
        env: environment variables that libraries read when they are loaded; such processes are
            started anew, never forked.
        root: a checkout that they import fusedformer from; None is that of this process.
    """

    def __init__(
        self, fresh: bool, env: "dict[str, str] | None" = None, root: "Path | None" = None
    ) -> None:
        self._fresh = fresh
        self._env = env or {}
        self._root = root
        can_fork = "forkserver" in multiprocessing.get_all_start_methods()
        forks = fresh and not env and root is None and can_fork
        self._context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload(_PRELOAD)
        self._process: Any = None
        self._connection: Any = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def _start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        # Not daemonic: torch.compile has processes of its own.
        self._process = self._context.Process(target=_serve, args=(theirs,))
        with self._passed_on():
            self._process.start()
        theirs.close()

    @contextlib.contextmanager
    def _passed_on(self) -> Iterator[None]:
        """Within the block, this process has the environment and path that a new one takes over."""
        before, path = dict(os.environ), list(sys.path)
        os.environ.update(self._env)
        if self._root is not None:
            sys.path.insert(0, str(self._root))
        try:
            yield
        finally:
            for name in self._env:
                if name in before:
                    os.environ[name] = before[name]
                else:
                    del os.environ[name]
            sys.path[:] = path

    def _end(self) -> None:
        if self._process is None:
            return
        self._connection.close()
        self._process.join(2)
        if self._process.is_alive():
            self._process.kill()
            # Not for ever: a driver may hold a process that was killed.
            self._process.join(_GONE_AFTER)
        self._process = None

    def run(self, function: Callable, *args: Any, timeout: float = math.inf) -> Outcome:
        """function(*args) in another process; function is importable, its value picklable.

        Args:
            timeout: seconds after which the call is ended and its outcome is TOO_SLOW.
        """
        if self._process is None:
            self._start()
        try:
            self._connection.send((function, args))
            if self._connection.poll(None if timeout == math.inf else max(0.0, timeout)):
                outcome, broken = self._connection.recv()
            else:
                outcome = Outcome(TOO_SLOW, reason=f"not done after {timeout:.0f} s")
                self._process.kill()
                self._end()
                return outcome
        except (EOFError, OSError):
            self._process.join(_GONE_AFTER)
            outcome = _death(self._process.exitcode)
            self._end()
            broken = False
        except BaseException:  # an interrupt: the call may run on for long
            self._process.kill()
            self._end()
            raise
        if self._fresh or broken:
            self._end()
        return outcome


def end_group(process: "subprocess.Popen[Any]") -> None:
    """Ends a process that was started with start_new_session, and all that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()  # Windows
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GONE_AFTER)


def _death(code: "int | None") -> Outcome:
    if code == -9:  # SIGKILL
        return Outcome(
            OUT_OF_MEMORY, reason="the process was killed, as a system out of memory does"
        )
    return Outcome(FAILED, reason=f"the process ended with exit code {code}")
