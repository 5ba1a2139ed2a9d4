"""How kernels are launched: on a GPU, in the interpreter, or recorded for `fusedformer aot`."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

# Decided when kernels are decorated, that is, at import.
INTERPRETED = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Chip:
    """What the choice of a launch configuration may depend on."""

    capability: int  # of the GPU, as 10 * major + minor: 80 is A100, 90 is H100 and H200
    multiprocessors: int


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what a GPU would have been asked to run."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]  # constexpr arguments and num_warps, num_stages


_recorded: "list[Launch] | None" = None
_recorded_chip: "Chip | None" = None

# Small, so that loops over more rows than programs are met in tests.
_INTERPRETED_CHIP = Chip(capability=90, multiprocessors=4)


def unsupported_device(device: torch.device) -> "str | None":
    """Why Triton kernels cannot run on a device, or None."""
    if INTERPRETED or _recorded is not None:
        return None
    if device.type != "cuda":
        return (
            f"Triton kernels need a CUDA GPU (or TRITON_INTERPRET=1, set before fusedformer is "
            f"imported); the tensors are on {device.type}"
        )
    if device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return _unsupported_gpu(device)


@functools.cache
def _unsupported_gpu(device: torch.device) -> "str | None":
    if torch.version.hip is not None:
        return "Triton kernels here are written and checked for NVIDIA GPUs; this is ROCm"
    if not torch.cuda.is_available():
        return "no CUDA GPU is available"
    capability = chip(device).capability
    if capability < 80:
        return f"needs compute capability 8.0 or later; {device} has {capability / 10}"
    return None


def unsupported_rows(*tensors: "torch.Tensor | None") -> "str | None":
    """Why kernels that work on rows cannot take these tensors, the first one not None; or None."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"{tensor.dtype} runs on the reference backend only"
        if tensor.dtype == torch.bfloat16 and INTERPRETED:
            return "Triton's interpreter does not round to bfloat16 as a GPU does"
        if tensor.numel() >= 2**40 or (tensor.dim() and tensor.shape[-1] >= 2**30):
            return "2^40 elements, or 2^30 columns, or more"
    assert tensors[0] is not None
    return unsupported_device(tensors[0].device)


@functools.cache
def _chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    return Chip(properties.major * 10 + properties.minor, properties.multi_processor_count)


def chip(device: torch.device) -> Chip:
    """The chip that a launch on ``device`` is configured for."""
    if _recorded_chip is not None:
        return _recorded_chip
    if INTERPRETED:
        return _INTERPRETED_CHIP
    return _chip(device.index if device.index is not None else torch.cuda.current_device())


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs ``kernel[grid](*args, **options)`` on the device of its first argument, a tensor."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, options))
        return
    first = args[0]
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


@contextlib.contextmanager
def recording(target: Chip) -> Iterator[list[Launch]]:
    """Within the block, launches are recorded for ``target`` instead of run; tensors may be meta.

    Not for use while other threads launch kernels.
    """
    global _recorded, _recorded_chip
    before = _recorded, _recorded_chip
    _recorded, _recorded_chip = [], target
    try:
        yield _recorded
    finally:
        _recorded, _recorded_chip = before
