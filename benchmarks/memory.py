"""How much memory calls take at their peak, beyond what was there before, and how much there is.

On a CPU it is the resident set of the process: its peak (VmHWM) after the call less its size
before, which is right only in a fresh process, since memory that an allocator keeps would hide the
next call's need. On a GPU it is the peak of torch's caching allocator.
"""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")

METHODS = {
    "cpu": "peak resident set of a fresh process per point, less its baseline",
    "cuda": "torch.cuda.max_memory_allocated, less the memory allocated before",
}


def _status_bytes(field: str) -> "int | None":
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def peak_rss() -> "int | None":
    """Bytes: the largest resident set of this process so far; None where nothing tells."""
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PeakMeter:
    """Peak memory since its creation.

    Args:
        device: "cpu" or "cuda". On a CPU create it after imports, inputs and a tiny warm-up call.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self.baseline: int | None = None
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.baseline = torch.cuda.memory_allocated()
            return
        # Linux: the peak becomes the present size. Elsewhere the baseline is the peak so far, so
        # that small needs read low and none reads high.
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")
        self.baseline = peak_rss()

    def extra(self) -> "int | None":
        """Bytes at the peak beyond the baseline; None where the system does not tell."""
        if self._cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if self._cuda else peak_rss()
        return None if peak is None or self.baseline is None else max(0, peak - self.baseline)


def available(device: str) -> "int | None":
    """Bytes that a new process may still take on "cpu" or "cuda"; None when unknown."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        # What the caching allocator holds but does not use is free to the next call.
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    bounds = [bound for bound in (_meminfo(), _cgroup()) if bound is not None]
    if bounds:
        return min(bounds)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return None


def _meminfo() -> "int | None":
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _cgroup() -> "int | None":
    """What a container's limit leaves (cgroup v2, then v1)."""
    root = Path("/sys/fs/cgroup")
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return int((root / limit).read_text()) - int((root / usage).read_text())
        except (OSError, ValueError):  # absent, or "max"
            continue
    return None


def return_freed_blocks() -> None:
    """Asks glibc to give large freed blocks back at once in this process, as it does over 32 MiB.

    By default it learns to keep those below, and a peak is then that of the live tensors plus
    whatever was kept: up to half as much again, but only for small problems.
    """
    m_mmap_threshold = -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 128 * 1024)


def first_to_be_killed() -> None:
    """Asks Linux to end this process, no other, if the machine runs out of memory."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
