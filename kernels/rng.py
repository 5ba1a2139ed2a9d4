"""The one random-number contract: which elements dropout drops, as a pure function of position.

Every backend reproduces these masks bit for bit. A call of Philox4x32 with 7 rounds (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) has the seed as its key and a position
as its counter, and gives four 32-bit words. Each word decides four elements: element ``b`` takes
the word rotated left by ``8 b`` bits and is dropped when that is below ``threshold(p)``. Every
decision is thus a full uniform 32-bit word, so that the drop probability is p to 2^-32; elements
that share a word are dependent only where their top bytes tie with the threshold's.

Two mappings of elements to (counter, word, byte):

- Attention, element (batch, head, query i, key j): a 16 x 16 tile has 4 x 4 calls of 4 words; a
  word decides (i, i + 8) x (j, j + 8), and a call holds the words of two neighbouring i and two
  neighbouring j. With the fragments of tensor-core instructions each word then has one owner in
  S and in its transpose.
- Rows, element (row, column) of a matrix: a call decides 16 neighbouring columns of one row.

A seed's mask is stable across releases; ``RNG_VERSION`` is raised if it ever changes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedformer.kernels.checks import is_integer

RNG_VERSION = 1
ROUNDS = 7

# One tag an op, so that two ops under one seed draw independent masks.
ATTENTION = 1
DROPOUT = 2
DROPOUT_ADD_NORM = 3
BIAS_ACTIVATION = 4

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def threshold(p: float) -> int:
    """The 32-bit number below which a word drops its element; 0 only for p = 0 (or below 2^-33)."""
    return min(round(p * 2**32), 2**32 - 1)


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed from torch's generator of ``device``: a 0-d int64 tensor there."""
    return torch.randint(2**63 - 1, (), device=device)


def check_seed(name: str, seed: object, device: torch.device) -> None:
    """Raises unless ``seed`` is None, an int of 64 bits or a 0-d int64 tensor on ``device``.

    Raises:
        TypeError, ValueError: it is none of these; ``name`` is the op's.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0 or seed.device != device:
            raise ValueError(
                f"{name}: seed must be an int or a 0-d int64 tensor on {device}; got a "
                f"{tuple(seed.shape)} {seed.dtype} tensor on {seed.device}"
            )
    elif seed is not None:
        if not is_integer(seed):
            raise TypeError(f"{name}: seed must be an int or a 0-d int64 tensor; got {seed!r}")
        if not -(2**63) <= int(seed) < 2**63:
            raise ValueError(f"{name}: seed must fit in 64 bits; got {seed}")


def as_seed(name: str, seed: "int | Tensor | None", device: torch.device) -> Tensor:
    """``seed`` as a 0-d int64 tensor on ``device``; drawn from torch's generator when None.

    Raises:
        TypeError, ValueError: as check_seed().
    """
    check_seed(name, seed, device)
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, Tensor):
        return seed
    # A fill on the device: no copy from the host, so no synchronisation.
    return torch.full((), int(seed), dtype=torch.int64, device=device)


def check_positions(op: str, shape: Sequence[int], offsets: Sequence[int]) -> None:
    """Raises ValueError where a position of attention's dropout has no counter of its own.

    Not while compiling: it would bound sizes that are symbols, and dynamic ones are to have none.
    """
    if torch.compiler.is_compiling():
        return
    for name, size, offset, bits in zip(
        ("batch", "head", "query", "key"), shape, offsets, (32, 16, 34, 34), strict=True
    ):
        if offset + size > 2**bits:
            raise ValueError(
                f"{op}: with dropout, {name} positions must stay below 2^{bits}; got {size} from "
                f"offset {offset} on"
            )


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-7: four words for each counter.

    Args:
        seed: 0-d int64, the 64-bit key.
        counter: four int64 tensors that broadcast together, each value in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape, each value in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        # int64 products wrap, but bits 0-31 and 32-63 of the true product are all there.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _kept(word: Tensor, byte: Tensor, p: float) -> Tensor:
    shift = 8 * byte
    rotated = ((word << shift) | (word >> (32 - shift))) & _WORD
    return rotated >= threshold(p)


def attention_keep(
    seed: Tensor,
    p: float,
    shape: Sequence[int],
    offsets: Sequence[int] = (0, 0, 0, 0),
) -> Tensor:
    """Which attention probabilities are kept.

    Args:
        seed: 0-d int64.
        p: drop probability, in [0, 1).
        shape: (B, H, Nq, Nk) of the scores.
        offsets: where batch, head, query and key start in the whole problem; those of query and
            key are multiples of 16.

    Returns:
        bool (B, H, Nq, Nk), True = kept.
    """
    batch, head, i, j = (
        torch.arange(n, device=seed.device) + start for n, start in zip(shape, offsets, strict=True)
    )
    first_i, first_j = offsets[2] // 16 * 4, offsets[3] // 16 * 4
    call_i = torch.arange((shape[2] + 15) // 16 * 4, device=seed.device) + first_i
    call_j = torch.arange((shape[3] + 15) // 16 * 4, device=seed.device) + first_j
    words = torch.stack(
        philox(
            seed,
            (
                call_i[:, None],
                call_j[None, :],
                ATTENTION << 16 | head[None, :, None, None],
                batch[:, None, None, None],
            ),
        ),
        dim=-1,
    )  # (B, H, 4 ceil(Nq / 16), 4 ceil(Nk / 16), 4)
    row = i // 16 * 4 + i % 8 // 2 - first_i
    column = j // 16 * 4 + j % 8 // 2 - first_j
    word = words[:, :, row[:, None], column, 2 * (i % 2)[:, None] + j % 2]
    return _kept(word, 2 * (i // 8 % 2)[:, None] + j // 8 % 2, p)


def rows_keep(seed: Tensor, p: float, rows: int, columns: int, tag: int) -> Tensor:
    """Which elements of a matrix are kept, for the ops that work on rows.

    Column c of a row is decided by call c // 16; of its 16 elements, e = c % 16 takes word e % 4
    and byte e // 4.

    Args:
        seed: 0-d int64.
        p: drop probability, in [0, 1).
        rows, columns: size of the matrix.
        tag: the op's tag, one of the constants of this module.

    Returns:
        bool (rows, columns), True = kept.
    """
    row = torch.arange(rows, device=seed.device)[:, None]
    call = torch.arange((columns + 15) // 16, device=seed.device)
    counter = (call & _WORD, row & _WORD, tag << 16 | row >> 32, call >> 32)
    words = torch.stack(philox(seed, counter), dim=-1)  # (rows, calls, 4)
    byte = torch.arange(4, device=seed.device)[:, None]
    kept = _kept(words[:, :, None, :], byte, p)  # (rows, calls, 4 bytes, 4 words)
    return kept.reshape(rows, -1)[:, :columns]
