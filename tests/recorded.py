"""What launchers would launch, for tests; runs in a worker of aot, where Triton does not interpret.

Launches are given as (kernel, types, constants, attributes, options): what is compiled. Two calls
that give the same sets share their compiled kernels.
"""

import os
from collections.abc import Callable

import torch

from fusedformer import aot

BF16, FP32 = torch.bfloat16, torch.float32


def _meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# --- Calls, forward and backward, by size ---------------------------------------------------------


def attention(length: int, batch: int, dim: int = 64, flags: str = "none") -> None:
    """flags: "none", "causal", "mask" (a row of keys), "bias" (a matrix with its gradient)."""
    from fusedformer.kernels.triton import attention as backend

    query, key, value, grad_out = (_meta(batch, 4, length, dim) for _ in range(4))
    mask = {
        "mask": lambda: _meta(batch, 1, 1, length, dtype=torch.bool),
        "bias": lambda: _meta(1, 4, length, length),
    }.get(flags, lambda: None)()
    lengths = _meta(batch, dtype=torch.int32) if flags == "mask" else None
    diagonal = 0 if flags == "causal" else None
    seed = _meta(dtype=torch.int64)
    args = (query, key, value, mask, lengths, seed, diagonal, dim**-0.5, 0.1, [0, 0, 0, 0])
    out, lse = backend.attention_fwd(*args)
    backend.attention_bwd(grad_out, None, out, lse, *args, flags == "bias")


def attention_offsets(offset: int) -> None:
    """A shard of the problem, somewhere in the whole."""
    from fusedformer.kernels.triton import attention as backend

    query, key, value, grad_out = (_meta(2, 4, 64, 64) for _ in range(4))
    args = (query, key, value, None, None, _meta(dtype=torch.int64), offset - 16, 0.125, 0.1)
    offsets = [offset, offset + 1, 16 * offset, 16 * offset]
    out, lse = backend.attention_fwd(*args, offsets)
    backend.attention_bwd(grad_out, None, out, lse, *args, offsets, False)


def layer_norm(rows: int, width: int) -> None:
    from fusedformer.kernels.triton import layer_norm as backend

    x, weight = _meta(rows, width), _meta(width, dtype=FP32)
    args = (weight, weight, _meta(dtype=torch.int64), 0.1)
    y, _, mean, rstd = backend.dropout_add_layer_norm_fwd(x, x, *args, 1e-5, False, False, BF16)
    backend.dropout_add_layer_norm_bwd(
        y, None, x, x, *args[:3], mean, rstd, 0.1, False, False, BF16, True, True, True
    )


def dropout(rows: int, width: int) -> None:
    from fusedformer.kernels.triton import dropout as backend

    backend.dropout_fwd(_meta(rows, width), _meta(dtype=torch.int64), 0.1)


def bias_activation(rows: int, width: int) -> None:
    from fusedformer.kernels.triton import activation as backend

    x = _meta(rows, width)
    args = (x, _meta(width), _meta(dtype=torch.int64), "gelu", 0.1)
    backend.bias_activation_bwd(backend.bias_activation_fwd(*args), *args, True)


def cross_entropy(rows: int, width: int) -> None:
    from fusedformer.kernels.triton import cross_entropy as backend

    logits, target = _meta(rows, width), _meta(rows, dtype=torch.int64)
    args = (target, _meta(width, dtype=FP32), -100, 0.1)
    losses, _, lse = backend.cross_entropy_fwd(logits, *args)
    backend.cross_entropy_bwd(losses, lse, logits, *args)


def attention_forward(config: tuple) -> tuple[str, str]:
    """TTGIR and PTX of a causal forward of head dimension 128 with this configuration."""
    from fusedformer.kernels.triton import attention as backend
    from fusedformer.kernels.triton import launch

    backend.forward_config = lambda *args: backend.Config(*config)
    with launch.recording(launch.Chip(90, 132)) as found:
        attention(4096, 2, 128, "causal")
    compiled = aot.compiled(found[0], 90).asm
    return compiled["ttgir"], compiled["ptx"]


# --- What of a launch is compiled -----------------------------------------------------------------


def _variants(call: Callable[[], None], capability: int) -> list[tuple[str, str]]:
    found = []
    for entry in aot.launches(aot.aot_cases.Case(16, False, call), capability):
        constexprs, options = aot.split_options(entry.options)
        compiled = (*aot.signature(entry.kernel, entry.args, constexprs), options)
        found.append((entry.kernel.__name__, repr(compiled)))
    return found


def by_size(op: str, sizes: list[tuple], capability: int = 90) -> dict[tuple, list]:
    """For each size, what a call of one of the functions above would have compiled."""
    call = globals()[op]
    return {size: _variants(lambda size=size: call(*size), capability) for size in sizes}


def kernels_of_cases(names: list[str], capability: int) -> dict[str, list[str]]:
    """For each case of aot, the kernels that it launches."""
    return {
        name: [entry.kernel.__name__ for entry in aot.launches(aot.CASES[name], capability)]
        for name in names
    }


def unlike_triton(names: list[str], capability: int) -> tuple[int, list[str]]:
    """How many launches the cases make, and those whose signature Triton would derive otherwise."""
    count, unlike = 0, []
    for name in names:
        for entry in aot.launches(aot.CASES[name], capability):
            constexprs, options = aot.split_options(entry.options)
            own = aot.signature(entry.kernel, entry.args, constexprs)
            if own != triton_signature(entry.kernel, entry.args, constexprs, options):
                unlike.append(f"{name}: {entry.kernel.__name__}")
            count += 1
    return count, unlike


def triton_signature(kernel, args: tuple, constexprs: dict, options: dict) -> tuple:
    """aot.signature as Triton's launch path makes it, with names for its positions."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*args, **constexprs)
    _, types, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    names = list(types)
    constants = {names[index]: value for (index,), value in constants.items()}
    return types, constants, {key: value for key, value in attributes.items() if value}


# --- Cases that fail ------------------------------------------------------------------------------

FAILURES = ("wrong", "unlaunched", "crash")


def start_worker_with_failures() -> None:
    """aot's start of a worker, then cases that fail, each in its way."""
    aot._start_worker()
    import triton

    from fusedformer.kernels.triton.launch import launch

    @triton.jit
    def wrong_kernel(x_ptr):
        x_ptr.no_such_method()

    calls = {
        "wrong": lambda: launch(wrong_kernel, (1,), _meta(16)),
        "unlaunched": lambda: 1 / 0,
        "crash": lambda: os._exit(1),
    }
    for name, call in calls.items():
        aot.CASES[name] = aot.aot_cases.Case(16, False, call)
