"""The calls that ``fusedformer aot`` compiles: every configuration that a launcher can choose.

A configuration depends on dtype, head dimension (or width), dropout and chip. The flags that only
switch code on and off are met all off, all on, and causal alone, the commonest.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A call of launchers, forward and backward, on meta tensors."""

    bits: int  # of its floating dtype
    quick: bool  # one of the few that CI compiles
    call: Callable[[], None]


CASES: dict[str, Case] = {}


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory: its address does not matter to what is compiled."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(dtype: torch.dtype, dim: int, flags: str, dropout: bool) -> None:
    from fusedformer.kernels.triton import attention as backend

    everything = flags in ("all", "ragged")
    heads, key_heads = 4, 2 if everything else 4
    length = 4095 if flags == "ragged" else 4096  # an odd one leaves the mask's rows unaligned
    query, grad_out = (meta(2, heads, length, dim, dtype=dtype) for _ in range(2))
    key, value = (meta(2, key_heads, length, dim, dtype=dtype) for _ in range(2))
    mask = {
        "all": lambda: meta(1, heads, length, length, dtype=dtype),
        "ragged": lambda: meta(1, heads, length, length, dtype=torch.float32),
        "bool": lambda: meta(2, 1, 1, length, dtype=torch.bool),
    }.get(flags, lambda: None)()
    lengths = meta(2, dtype=torch.int32) if everything or flags == "bool" else None
    seed = meta(dtype=torch.int64) if dropout else None
    diagonal = None if flags == "none" else 0
    args = (
        query, key, value, mask, lengths, seed, diagonal, dim**-0.5, 0.1 if dropout else 0.0,
        [0, 0, 0, 0],
    )  # fmt: skip
    out, lse = backend.attention_fwd(*args)
    grad_lse = lse if everything else None
    backend.attention_bwd(grad_out, grad_lse, out, lse, *args, everything)


def _add_attention() -> None:
    for dtype_name, dtype in DTYPES.items():
        for dim in (16, 32, 64, 72, 128, 256):
            for flags in ("none", "causal", "bool", "all", "ragged"):
                for dropout in (False, True):
                    name = f"attention-{dtype_name}-d{dim}-{flags}-p{0.1 if dropout else 0}"
                    quick = dim in (64, 128) and dtype_name != "fp16"
                    quick = quick and (flags, dropout) in (("all", True), ("none", False))

                    def call(dtype=dtype, dim=dim, flags=flags, dropout=dropout):
                        _attention(dtype, dim, flags, dropout)

                    CASES[name] = Case(16 if dtype.itemsize == 2 else 32, quick, call)


_add_attention()
