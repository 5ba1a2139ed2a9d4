"""The library of the CUDA kernels (csrc/cuda): which GPUs it is for, whether it is there, loading.

``fusedformer build cuda`` builds it, or the first call on such a GPU that names the backend; asking
whether a device could run it builds nothing.
"""

import functools

import torch

from fusedformer.kernels import native_build_cuda
from fusedformer.kernels.native_build_cuda import CAPABILITY, GPUS
from fusedformer.kernels.native_cache import BuildError


@functools.cache
def library() -> "tuple[str | None, str | None]":
    """Loads the library, building it if need be: its path and None, or None and the reason."""
    try:
        path = native_build_cuda.find()
        torch.ops.load_library(str(path))
    except (BuildError, OSError) as error:
        return None, f"there is no CUDA library: {error}"
    return str(path), None


def about() -> "dict[str, str | None]":
    """What `fusedformer doctor` shows: the library, or why there is none, or nvcc to build it."""
    found: dict[str, str | None] = {"library": None, "error": None, "compiler": None, "gpus": GPUS}
    try:
        path = native_build_cuda.present()
        if path is not None:
            return found | {"library": str(path)}
        nvcc = native_build_cuda.find_nvcc()
        return found | {"compiler": f"nvcc {nvcc.version} ({nvcc.path})"}
    except BuildError as error:
        return found | {"error": str(error)}


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def unsupported_gpu(device: torch.device) -> "str | None":
    """Why a device is none that the kernels are for, or None."""
    if device.type != "cuda":
        return f"the CUDA kernels need {GPUS}; the tensors are on {device.type}"
    if torch.version.hip is not None:
        return f"the CUDA kernels need {GPUS}; this is ROCm"
    if not torch.cuda.is_available():
        return "no CUDA GPU is available"
    capability = _capability(
        device.index if device.index is not None else torch.cuda.current_device()
    )
    if capability != CAPABILITY:
        return f"the CUDA kernels need {GPUS}; {device} has {'.'.join(map(str, capability))}"
    return None


def unsupported_device(device: torch.device) -> "str | None":
    """Why these kernels cannot run on a device, or None: they can, or could once they are built."""
    return unsupported_gpu(device) or _missing()


def _missing() -> "str | None":
    if library.cache_info().currsize:  # a call has asked for it before
        return library()[1]
    try:
        native_build_cuda.present()
    except BuildError as error:
        return f"there is no CUDA library: {error}"
    return None
