"""The backend "cpu": kernels in C++ (csrc/cpu), as PyTorch functions that the ops call.

Conventions, for every op (csrc/cpu/ops.cpp has those of the C++ side):

- ``<op>_fwd`` and ``<op>_bwd`` have the arguments and results of reference.py's and call
  ``torch.ops.fusedformer_native.<op>_fwd``, private entry points that trust what was checked.
- ``<op>_unsupported(*args)`` says why a call cannot run here, or None. An op that is not here yet
  has neither; dispatch then says so.
- Nothing is built or loaded at import: library_error() does that, once, the first time an op asks.
"""

import functools

import torch

from fusedformer.kernels import native_build

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def library() -> "tuple[str | None, str | None]":
    """Loads the C++ library, building it if need be: its path and None, or None and the reason."""
    try:
        path = native_build.PREBUILT
        if not path.is_file():
            path = native_build.build()
        torch.ops.load_library(str(path))
    except (native_build.BuildError, OSError) as error:
        return None, f"there is no C++ library: {error}"
    return str(path), None


def about() -> "dict[str, str | None]":
    """What `fusedformer doctor` shows of this backend."""
    path, error = library()
    if path is None:
        return {"library": None, "error": error}
    ops = torch.ops.fusedformer_native
    return {
        "library": path,
        "instruction_set": ops.isa(),
        "instruction_sets": ops.isas(),
        "compiler": ops.compiler(),
    }


def unsupported_device(device: torch.device) -> "str | None":
    """Why these kernels cannot run on a device, or None."""
    if device.type != "cpu":
        return f"the C++ kernels run on the CPU; the tensors are on {device.type}"
    return library()[1]


def unsupported_tensors(*tensors: "torch.Tensor | None") -> "str | None":
    """Why kernels cannot take these tensors, the first one not None; or None."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in _DTYPES:
            return f"{tensor.dtype} runs on the reference backend only"
    assert tensors[0] is not None
    return unsupported_device(tensors[0].device)
