"""How the machine code of the row kernels reads and writes memory; runs in a worker of aot."""

import re
import subprocess
import tempfile
from collections import Counter

import torch

from fusedformer import aot

BF16, FP32 = torch.bfloat16, torch.float32
ROWS = 4096


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def layer_norm(width: int, dtype: torch.dtype, prenorm: bool, dropped: bool) -> None:
    """A residual stream in float32 where prenorm, in x's dtype otherwise; parameters in float32."""
    from fusedformer.kernels.triton import layer_norm as backend

    x, weight = _meta(ROWS, width, dtype=dtype), _meta(width, dtype=FP32)
    z_dtype = FP32 if prenorm else dtype
    residual = _meta(ROWS, width, dtype=z_dtype)
    seed, p = (_meta(dtype=torch.int64), 0.1) if dropped else (None, 0.0)
    y, z, mean, rstd = backend.dropout_add_layer_norm_fwd(
        x, residual, weight, weight, seed, p, 1e-5, False, prenorm, z_dtype
    )
    source, kept = (x, residual) if z is None else (z, None)
    backend.dropout_add_layer_norm_bwd(
        y, z, source, kept, weight, weight, seed, mean, rstd, p, False, prenorm, z_dtype,
        True, True, True,
    )  # fmt: skip


def dropout(width: int, dtype: torch.dtype) -> None:
    from fusedformer.kernels.triton import dropout as backend

    backend.dropout_fwd(_meta(ROWS, width, dtype=dtype), _meta(dtype=torch.int64), 0.1)


def bias_activation(width: int, dtype: torch.dtype) -> None:
    from fusedformer.kernels.triton import activation as backend

    x, seed = _meta(ROWS, width, dtype=dtype), _meta(dtype=torch.int64)
    args = (x, _meta(width, dtype=dtype), seed, "gelu", 0.1)
    backend.bias_activation_bwd(backend.bias_activation_fwd(*args), *args, True)


def cross_entropy(width: int, dtype: torch.dtype) -> None:
    from fusedformer.kernels.triton import cross_entropy as backend

    logits, target = _meta(ROWS, width, dtype=dtype), _meta(ROWS, dtype=torch.int64)
    losses, _, lse = backend.cross_entropy_fwd(logits, target, None, -100, 0.0)
    backend.cross_entropy_bwd(losses, lse, logits, target, None, -100, 0.0)


_ACCESS = re.compile(r"\b(LDGSTS|LDG|STG)\b((?:\.\w+)*)")
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def _accesses(cubin: bytes) -> Counter:
    """Instructions that access global memory, by what they do and how many bytes a thread has."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: Counter = Counter()
    for name, modifiers in _ACCESS.findall(text):
        widths = [size for word, size in _BYTES.items() if f".{word}" in f"{modifiers}."]
        found[name, widths[0] if widths else 4] += 1
    return found


def of_op(op: str, *args: object) -> "dict[str, tuple[Counter, dict]]":
    """For each kernel of a call of a function above: its accesses and the launch's options."""
    found = {}
    for entry in aot.launches(aot.aot_cases.Case(16, False, lambda: globals()[op](*args)), 90):
        options = {k: v for k, v in entry.options.items() if isinstance(v, int)}
        cubin = aot.compiled(entry, 90).asm["cubin"]
        found[entry.kernel.__name__] = _accesses(cubin), options
    return found
