"""The C++ library of the backend "cpu" in this process, and its entry points by name."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from fusedformer.kernels import native_build, rng

_ops = torch.ops.fusedformer_native


@functools.cache
def library() -> "tuple[str | None, str | None]":
    """Loads the C++ library, building it if need be: its path and None, or None and the reason."""
    try:
        path = native_build.find()
        torch.ops.load_library(str(path))
    except (native_build.BuildError, OSError) as error:
        return None, f"there is no C++ library: {error}"
    return str(path), None


def about() -> "dict[str, str | None]":
    """What `fusedformer doctor` shows of this backend."""
    path, error = library()
    if path is None:
        return {"library": None, "error": error}
    return {
        "library": path,
        "instruction_set": _ops.isa(),
        "instruction_sets": _ops.isas(),
        "compiler": _ops.compiler(),
    }


@functools.cache
def entry(name: str) -> Callable[..., Any]:
    """An entry point of the library, once that is loaded: the C function beneath its OpOverload."""
    overload = getattr(_ops, name).default
    return getattr(overload, "_op", overload)


def dropout_options(p: float) -> tuple[int, float]:
    """The threshold, and the scale of what is kept."""
    return rng.threshold(p), 1 / (1 - p)
