"""Traces of a call: torch.profiler's for Perfetto, and Proton's where Triton has it on a GPU."""

import importlib
from collections.abc import Callable
from pathlib import Path

import torch


def write(path: Path, call: Callable[[], object], device: str) -> list[str]:
    """Runs a call twice to warm up, then once under each profiler.

    Args:
        path: of torch.profiler's trace (https://ui.perfetto.dev opens it); Proton's lies beside it
            with the suffix ".hatchet".

    Returns:
        What was written or left out, a sentence each.
    """
    for _ in range(2):
        call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        torch.cuda.synchronize()
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return [f"torch.profiler's trace: {path}", _proton(path, call, device)]


def _proton(path: Path, call: Callable[[], object], device: str) -> str:
    if device != "cuda":
        return "no Proton trace: it needs a GPU"
    try:
        proton = importlib.import_module("triton.profiler")
    except Exception as error:  # it is absent from some builds of Triton
        return f"no Proton trace: {type(error).__name__}: {error}"
    name = path.with_suffix("")
    proton.start(str(name))
    call()
    torch.cuda.synchronize()
    proton.finalize()
    return f"Proton's trace: {name}.hatchet (proton-viewer reads it)"
