"""How kernels are launched: on a GPU, in the interpreter, or recorded for `fusedformer aot`."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

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


# Compiled kernels by what they were compiled for, and their constexpr arguments; see launch().
_compiled: dict[tuple, tuple[Any, tuple]] = {}
_MOST_COMPILED = 4096  # keys hold sizes, of which there is no end

_FLOATING = (torch.float32, torch.float16, torch.bfloat16)
_NUMBERS = frozenset((int, float, bool, type(None)))

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


def unsupported_rows(x: torch.Tensor, *others: "torch.Tensor | None") -> "str | None":
    """Why kernels on the rows of x, and of others no larger, cannot take them; or None."""
    for tensor in (x, *others):
        if tensor is not None:
            if tensor.dtype not in _FLOATING:
                return f"{tensor.dtype} runs on the reference backend only"
            if INTERPRETED and tensor.dtype == torch.bfloat16:
                return "Triton's interpreter does not round to bfloat16 as a GPU does"
    if x.numel() >= 2**40 or (x.dim() and x.shape[-1] >= 2**30):
        return "2^40 elements, or 2^30 columns, or more"
    return unsupported_device(x.device)


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


def launch(kernel: Any, grid: tuple[int], *args: Any, **options: Any) -> None:
    """Runs ``kernel[grid](*args, **options)`` on the device of its first argument, a tensor.

    Args:
        kernel: a jitted function whose constexpr parameters come last.
        grid: how many programs.
        args: its other arguments: tensors, numbers, None.
        options: constexpr arguments, and num_warps, num_stages. With DESCRIPTORS the kernel makes
            tensor descriptors, for which each program has 128 bytes apiece on the device.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, options))
        return
    if options.get("DESCRIPTORS"):
        # In a context of its own: what the caller has set for kernels of theirs stays.
        context = contextvars.copy_context()
        context.run(triton.set_allocator, _workspace)
        context.run(_launch, kernel, grid, args, options)
    else:
        _launch(kernel, grid, args, options)


def _workspace(size: int, alignment: int, stream: "int | None") -> torch.Tensor:
    """Bytes on the current device; torch aligns them to more than a descriptor needs."""
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def _launch(kernel: Any, grid: tuple[int], args: tuple, options: dict[str, Any]) -> None:
    first = args[0]
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            _run(kernel, grid, args, options)
    else:
        _run(kernel, grid, args, options)


def _run(kernel: Any, grid: tuple[int], args: tuple, options: dict[str, Any]) -> None:
    """``kernel[grid](*args, **options)``, on the current device.

    To find what it compiled, a jitted function looks into each argument of each launch. What it
    compiled depends on no more than the numbers, the tensors' dtypes and whether they start at a
    multiple of 16 bytes. So a call like an earlier one launches what that one returned, as Triton's
    tutorial on the fused softmax does.
    """
    knobs = triton.knobs
    key = (
        id(kernel), args[0].get_device(), knobs.runtime.debug,
        knobs.compilation.instrumentation_mode, *options.values(),
        *[x if type(x) in _NUMBERS else (x.dtype, x.data_ptr() % 16 == 0) for x in args],
    )  # fmt: skip
    found = _compiled.get(key)
    if found is not None:
        compiled, constants = found
        compiled[grid[0], 1, 1](*args, *constants)
        return
    compiled = kernel[grid](*args, **options)
    if isinstance(compiled, CompiledKernel):  # nothing is compiled in the interpreter
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        constants = tuple(options[name] for name in kernel.arg_names[len(args) :])
        _compiled[key] = compiled, constants


def cdiv(number: int, divisor: int) -> int:
    """The quotient, rounded up; triton.cdiv, for the host alone, takes a hundred times as long."""
    return -(-number // divisor)


def power_of_2(number: int) -> int:
    """The least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


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
