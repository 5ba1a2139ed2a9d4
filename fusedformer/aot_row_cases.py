"""The calls of the ops on rows that ``fusedformer aot`` compiles; see aot_cases.

A configuration depends on width, dtype, and on what the backward holds: all of them are here, and
widths that are no multiple of 16, whose accesses are not aligned.
"""

from functools import partial

import torch

from fusedformer.aot_cases import DTYPES, Case, meta

CASES: dict[str, Case] = {}

# The blocks of one tile, 8192 and 16384 as the last of the backward and forward, one beyond.
WIDTHS = (1, 17, 64, 100, 128, 256, 512, 768, 1000, 1024, 2048, 4096, 8192, 16384, 20000)
ROWS = 4096
# What CI compiles: each kernel, flags on and off, an unaligned width.
QUICK = {
    (1024, "plain"),
    (768, "prenorm"),
    (1000, "postnorm"),
    (8192, "postnorm"),
    (20000, "prenorm"),
}


def _layer_norm(dtype: torch.dtype, width: int, flags: str) -> None:
    from fusedformer.kernels.triton import layer_norm as backend

    x = meta(ROWS, width, dtype=dtype)
    weight = meta(width, dtype=torch.float32)
    bias = None if flags == "rms" else weight
    prenorm, rms = flags == "prenorm", flags == "rms"
    # A float32 residual stream is the usual one before a norm, x's own dtype after one.
    z_dtype = torch.float32 if prenorm else dtype
    dropped = flags in ("prenorm", "postnorm")
    residual = meta(ROWS, width, dtype=z_dtype) if dropped else None
    seed, p = (meta(dtype=torch.int64), 0.1) if dropped else (None, 0.0)
    y, z, mean, rstd = backend.dropout_add_layer_norm_fwd(
        x, residual, weight, bias, seed, p, 1e-5, rms, prenorm, z_dtype
    )
    source, kept = (x, residual) if z is None else (z, None)
    backend.dropout_add_layer_norm_bwd(
        y, z, source, kept, weight, bias, seed, mean, rstd, p, rms, prenorm, z_dtype,
        dropped, True, bias is not None,
    )  # fmt: skip


def _dropout(dtype: torch.dtype, rows: int, width: int) -> None:
    from fusedformer.kernels.triton import dropout as backend

    backend.dropout_fwd(meta(rows, width, dtype=dtype), meta(dtype=torch.int64), 0.1)


def _add() -> None:
    for name, dtype in DTYPES.items():
        bits = 16 if dtype.itemsize == 2 else 32
        for width in WIDTHS:
            for flags in ("plain", "rms", "prenorm", "postnorm"):
                quick = name == "bf16" and (width, flags) in QUICK
                call = partial(_layer_norm, dtype, width, flags)
                CASES[f"layer_norm-{name}-w{width}-{flags}"] = Case(bits, quick, call)
        for rows, width in ((ROWS, 1), (ROWS, 17), (ROWS, 100), (ROWS, 1024), (1, 10**6)):
            quick = name == "bf16" and width == 1024
            call = partial(_dropout, dtype, rows, width)
            CASES[f"dropout-{name}-{rows}x{width}"] = Case(bits, quick, call)


_add()
