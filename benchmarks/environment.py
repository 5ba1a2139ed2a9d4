"""What a result was measured on: machine, versions, commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import fusedformer
from fusedformer.kernels import rng


def describe(device: str) -> dict:
    """JSON-ready facts about the machine, the versions and the commit in use.

    Args:
        device: "cpu" or "cuda".
    """
    commit = _git("rev-parse", "HEAD")
    gpu = device == "cuda"
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name() if gpu else cpu_name(),
        "cpu_name": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "logical_cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        **(_gpu() if gpu else {}),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "fusedformer": fusedformer.__version__,
        "rng_version": rng.RNG_VERSION,
        "commit": commit,
        "uncommitted_changes": bool(_git("status", "--porcelain", "-uno")) if commit else None,
    }


def _gpu() -> dict:
    properties = torch.cuda.get_device_properties(0)
    return {
        "compute_capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def cpu_name() -> str:
    """The processor's name as its maker gives it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version(package: str) -> "str | None":
    """A distribution's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> "str | None":
    # Only a checkout has setup.py and benchmarks/ side by side; an installed copy may sit inside
    # a git repository that is someone else's.
    root = Path(__file__).resolve().parent.parent
    if not (root / "setup.py").is_file() and not (root / ".git").exists():
        return None
    return _output("git", "-C", str(root), *args)


def _output(*command: str) -> "str | None":
    """What a command prints, or None where it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
