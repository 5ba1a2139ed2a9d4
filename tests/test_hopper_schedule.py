"""The order of the CUDA kernels' tiles, and the blocks of keys they need, compiled for the host."""

import ctypes
import random
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "hopper" / "schedule_main.cpp"
COMPILER = shutil.which("c++") or shutil.which("g++")
SECTION_BYTES = 32 << 20

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler here")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("schedule") / "schedule.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *flags, SOURCE, "-o", path], check=True)
    return ctypes.CDLL(str(path))


def tiles_in_order(library, batches, heads, key_heads, n_queries, rows, head_bytes, last_first):
    """[(head, tile of the head)] in order, and how many heads a section has."""
    limit = batches * heads * (-(-n_queries // rows))
    head, block = ((ctypes.c_int * limit)() for _ in range(2))
    section = ctypes.c_int()
    sizes = (batches, heads, key_heads, n_queries, rows)
    count = library.order_of_tiles(
        *sizes, ctypes.c_longlong(head_bytes), last_first, limit, head, block, ctypes.byref(section)
    )
    assert count == limit
    return list(zip(head, block, strict=True)), section.value


@pytest.mark.parametrize("last_first", [True, False])
def test_every_tile_once_longest_first_in_sections(library, last_first):
    source = random.Random(0)
    for _ in range(200):
        batches, key_heads, group = (source.randint(1, 5) for _ in range(3))
        heads, n_queries = key_heads * group, source.randint(1, 1500)
        rows = source.choice([64, 128, 192])
        head_bytes = source.choice([0, 1, 1 << 20, 9 << 20, SECTION_BYTES // 2, 33 << 20])
        tiles, section = tiles_in_order(
            library, batches, heads, key_heads, n_queries, rows, head_bytes, last_first
        )
        blocks = -(-n_queries // rows)
        assert sorted(tiles) == [(h, b) for h in range(batches * heads) for b in range(blocks)]
        # A section is whole groups, and as many as fit.
        assert section % group == 0
        groups = section // group
        assert groups == 1 or groups * head_bytes <= SECTION_BYTES
        assert groups == batches * key_heads or (groups + 1) * head_bytes > SECTION_BYTES
        # Section after section; in each, all heads' longest tiles before any shorter one.
        ranks = [
            (head // section, blocks - 1 - block if last_first else block) for head, block in tiles
        ]
        assert ranks == sorted(ranks)


def test_blocks_of_keys_against_the_mask(library):
    source = random.Random(1)
    needed, whole = ctypes.c_int(), ctypes.c_int()
    edges = {"empty": 0, "none whole": 0, "all whole": 0}
    for _ in range(3000):
        n_queries, n_keys = source.randint(1, 40), source.randint(1, 40)
        columns = source.choice([4, 8, 16])
        first = source.randrange(n_queries)
        end = min(n_queries, first + source.choice([1, 8, 16]))
        length = source.choice([n_keys, source.randint(-2, n_keys + 2)])
        diagonal = source.choice([n_keys, source.randint(-n_queries, n_keys)])
        library.blocks_of_keys(
            first, end, length, n_keys, diagonal, columns, ctypes.byref(needed), ctypes.byref(whole)
        )
        seen = [
            [j <= i + diagonal and j < length and j < n_keys for j in range(n_keys)]
            for i in range(first, end)
        ]
        last = max((j for row in seen for j in range(n_keys) if row[j]), default=-1)
        assert needed.value == last // columns + 1
        blocks = [[row[b : b + columns] for row in seen] for b in range(0, n_keys, columns)]
        is_whole = [all(len(row) == columns and all(row) for row in block) for block in blocks]
        assert is_whole == [block < whole.value for block in range(len(blocks))]
        edges["empty"] += needed.value == 0
        edges["none whole"] += whole.value == 0 < needed.value
        edges["all whole"] += whole.value == needed.value > 0
    assert all(edges.values()), edges
