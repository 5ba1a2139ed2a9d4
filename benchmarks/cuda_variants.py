"""The variants of the CUDA forward (csrc/cuda/variants), as calls on tensors.

    variants()               what there is; builds their library first, with nvcc
    forward(i, q, k, v, ...) one of them

The arguments are csrc/cuda/attention.h's, by ctypes: nothing of torch is compiled.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedformer.kernels import native_build_cuda, rng


class Tensor4(ctypes.Structure):
    """csrc/cuda/attention.h; of a (B, H, N, D) tensor."""

    _fields_ = [("data", ctypes.c_void_p), *((n, ctypes.c_int64) for n in ("b", "h", "n"))]

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.stride(3) == 1
        super().__init__(tensor.data_ptr(), *tensor.stride()[:3])


class Attention(ctypes.Structure):
    """csrc/cuda/attention.h"""

    _fields_ = [
        *((n, ctypes.c_int) for n in ("batches", "heads", "key_heads", "n_queries", "n_keys")),
        ("dim", ctypes.c_int),
        ("dtype", ctypes.c_int),
        *((n, Tensor4) for n in ("query", "key", "value", "out")),
        ("lse", ctypes.c_void_p),
        ("key_lengths", ctypes.c_void_p),
        ("diagonal", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("seed", ctypes.c_void_p),
        ("threshold", ctypes.c_uint32),
        ("inverse_keep", ctypes.c_float),
        ("offsets", ctypes.c_int64 * 4),
        ("counter", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Variant:
    """One of the library's list; the name is "" for the tile that the kernels' library has."""

    index: int
    name: str
    dim: int
    takes_plain: bool
    takes_dropout: bool

    def takes(self, p: float) -> bool:
        """Whether it is compiled for calls with this dropout probability."""
        return self.takes_dropout if p else self.takes_plain


@functools.cache
def library() -> ctypes.CDLL:
    """The variants' library, built if need be.

    Raises:
        BuildError: it cannot be built; one line.
    """
    return load(native_build_cuda.build_variants())


def load(path: Path) -> ctypes.CDLL:
    """A library of variants."""
    found = ctypes.CDLL(str(path))
    found.variant_name.restype = found.variant_run.restype = ctypes.c_char_p
    found.variant_takes.restype = ctypes.c_bool
    if found.attention_bytes() != ctypes.sizeof(Attention):
        raise RuntimeError("benchmarks/cuda_variants.py: Attention is not csrc/cuda/attention.h's")
    return found


def variants() -> list[Variant]:
    """All that there are, those of one head dimension together, the present tile first."""
    return listed(library())


def listed(lib: ctypes.CDLL) -> list[Variant]:
    """What a library has."""
    return [
        Variant(
            i, lib.variant_name(i).decode(), lib.variant_dim(i),
            lib.variant_takes(i, False), lib.variant_takes(i, True),
        )
        for i in range(lib.variant_count())
    ]  # fmt: skip


def attention_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    counter: Tensor,
    *,
    key_lengths: "Tensor | None" = None,
    seed: "Tensor | None" = None,
    diagonal: "int | None" = None,
    scale: "float | None" = None,
    dropout_p: float = 0.0,
    offsets: tuple[int, ...] = (0, 0, 0, 0),
) -> Attention:
    """The structure for a call. The tensors must live as long as it is used.

    Args:
        query, key, value, out: (B, H, N, D), bfloat16 or float16.
        lse: (B, H, Nq), float32.
        counter: one int32.
        key_lengths: (B,), int32.
        seed: 0-d, int64; given where dropout_p is not 0.
        diagonal: query i sees keys up to i + diagonal; None: all.
        scale: of the scores; None: 1 / sqrt(D).
    """

    def pointer(tensor: "Tensor | None") -> "int | None":
        return None if tensor is None else tensor.data_ptr()

    return Attention(
        *query.shape[:2], key.shape[1], query.shape[2], *key.shape[2:],
        0 if query.dtype == torch.bfloat16 else 1,
        *map(Tensor4, (query, key, value, out)), pointer(lse), pointer(key_lengths),
        key.shape[2] if diagonal is None else diagonal,
        query.shape[3] ** -0.5 if scale is None else scale, pointer(seed),
        rng.threshold(dropout_p), 1 / (1 - dropout_p), (ctypes.c_int64 * 4)(*offsets),
        pointer(counter),
    )  # fmt: skip


def forward(
    variant: Variant, query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """O (B, H, Nq, D) and LSE (B, H, Nq) by a variant, on torch's current stream.

    Args:
        options: attention_arguments()'s.

    Raises:
        RuntimeError: it was not launched.
    """
    batch, heads, n_queries, dim = query.shape
    out = query.new_empty(batch, n_queries, heads, dim).transpose(1, 2)
    lse = query.new_empty(batch, heads, n_queries, dtype=torch.float32)
    counter = query.new_empty((), dtype=torch.int32)
    call = attention_arguments(query, key, value, out, lse, counter, **options)
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    error = library().variant_run(variant.index, ctypes.byref(call), stream)
    if error is not None:
        raise RuntimeError(error.decode())
    return out, lse
