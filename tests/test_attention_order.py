"""In what order attention on Triton takes its tiles: each once, under a mask the longest first."""

import random

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from fusedformer.kernels.triton import attention
from fusedformer.kernels.triton.attention_tiles import tile_of


@triton.jit
def order_kernel(found, tiles, section, CAUSAL: tl.constexpr, LAST_FIRST: tl.constexpr):
    program = tl.program_id(0)
    tile, batch_head = tile_of(program, tiles, section, CAUSAL, LAST_FIRST)
    tl.store(found + 2 * program, batch_head)
    tl.store(found + 2 * program + 1, tile)


def order(heads, tiles, section, causal, last_first):
    """[(head, tile)] by program."""
    found = torch.full((heads * tiles, 2), -1, dtype=torch.int32)
    order_kernel[(heads * tiles,)](found, tiles, section, causal, last_first)
    return [tuple(pair) for pair in found.tolist()]


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("last_first", [True, False])
def test_every_tile_once_longest_first_in_sections(last_first):
    source = random.Random(0)
    for heads, section in ((1, 1), (5, 2), (6, 3), (4, 4), (3, 2)):
        tiles = source.randint(1, 6)
        found = order(heads, tiles, section, True, last_first)
        assert sorted(found) == [(h, t) for h in range(heads) for t in range(tiles)]
        ranks = [(h // section, tiles - 1 - t if last_first else t) for h, t in found]
        assert ranks == sorted(ranks)
        assert order(heads, tiles, section, False, last_first) == sorted(found)


def test_a_section_is_what_the_cache_holds():
    """Whole groups of heads; of one head of 8192 keys at d = 128, K and V are 4 MB."""
    key = torch.empty(2, 6, 8192, 128, dtype=torch.bfloat16, device="meta")
    assert attention._section(key, 1) == 8
    assert attention._section(key, 4) == 32
    assert attention._section(key[:, :, :4096], 4) == 2 * 6 * 4  # all there are
    assert attention._section(torch.cat([key] * 16, dim=2), 4) == 4  # one group at the least
    assert attention._section(key[:, :, :0], 1) == 12
