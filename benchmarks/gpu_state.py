"""Clocks, power and temperature of the GPU while something is measured, from nvidia-smi."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from statistics import median

_FIELDS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "watts": "power.draw",
    "celsius": "temperature.gpu",
}
_EVERY_MS = 100


@contextlib.contextmanager
def watched(device: str) -> Iterator[dict]:
    """Within the block, reads the first GPU; afterwards the dictionary holds what was read.

    It is empty on a CPU and where nvidia-smi is missing; else "sm_mhz", "memory_mhz", "watts" and
    "celsius", each {"low", "median", "high"}.
    """
    found: dict = {}
    tool = shutil.which("nvidia-smi")
    if device != "cuda" or tool is None:
        yield found
        return
    process = subprocess.Popen(
        [
            tool, "--id=0", f"--query-gpu={','.join(_FIELDS.values())}",
            "--format=csv,noheader,nounits", f"--loop-ms={_EVERY_MS}",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        yield found
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            text, _ = process.communicate(timeout=5)
            found |= summary(text)


def summary(text: str) -> dict:
    """What the lines of nvidia-smi say; readings that are not numbers are left out."""
    columns: dict[str, list[float]] = {name: [] for name in _FIELDS}
    for line in text.splitlines():
        for name, part in zip(_FIELDS, line.split(","), strict=False):
            with contextlib.suppress(ValueError):
                columns[name].append(float(part))
    return {
        name: {"low": min(held), "median": median(held), "high": max(held)}
        for name, held in columns.items()
        if held
    }
