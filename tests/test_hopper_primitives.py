"""What Hopper's kernels are built of: layouts, dropout's bits, and functions for instructions.

Layouts are tested against counting, and against what Triton, whose kernels run on the chip, has in
its PTX; the functions by what nvcc makes of them.
"""

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import hopper_calls
import ptx_products
import pytest
import torch

from fusedformer.kernels import native_build_cuda, rng
from fusedformer.kernels.native_cache import BuildError

pytestmark = pytest.mark.skipif(
    hopper_calls.COMPILER is None, reason="there is no C++ compiler here"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The functions of layouts.h and dropout_bits.h."""
    built = hopper_calls.build_driver(
        "layouts_main.cpp", 0, tmp_path_factory.mktemp("layouts") / "layouts.so", []
    )
    built.k_major.restype = built.transposed.restype = ctypes.c_uint64
    built.dropout_tile.argtypes = [
        ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32,
        ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p,
    ]  # fmt: skip
    return built


# ---- Layouts -------------------------------------------------------------------------------------


def test_swizzle(library):
    # A panel of 64 rows of 128 bytes, byte by byte.
    places = [library.swizzle_of(byte) for byte in range(64 * 128)]
    assert sorted(places) == list(range(64 * 128))
    for byte, place in enumerate(places):
        row, chunk = divmod(byte, 128)
        assert (place // 128, place % 16) == (row, byte % 16)
        assert place % 128 // 16 == chunk // 16 ^ row % 8
    # The point of it: the chunks of a column in 8 rows use all 32 banks.
    for first in range(0, 64, 8):
        for chunk in range(8):
            banks = {places[(first + r) * 128 + chunk * 16] % 128 // 16 for r in range(8)}
            assert banks == set(range(8))


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 128), (64, 96), (80, 256)])
def test_tile_byte(library, rows, columns):
    # As a box of TMA for each panel, and nothing in two places.
    seen = set()
    for row in range(rows):
        for column in range(columns):
            place = library.tile_byte_of(rows, row, column)
            panel, rest = divmod(place, rows * 128)
            assert (panel, rest // 128) == (column // 64, row)
            assert rest % 128 == (column % 64 // 8 ^ row % 8) * 16 + column % 8 * 2
            seen.add(place)
    assert len(seen) == rows * columns
    assert library.tile_bytes_of(rows, columns) == rows * 128 * -(-columns // 64)


def fragment(columns: int) -> dict[tuple[int, int], tuple[int, int]]:
    """(thread, register) -> (row, column) of a 64 x columns accumulator, by counting.

    Warp after warp has 16 rows; 16 x 8 blocks follow one another; of a block the upper 8 x 8 come
    first, whose 32 pairs of columns go to the lanes in turn.
    """
    places, registers = {}, [0] * 128
    for warp in range(4):
        for block in range(columns // 8):
            for upper in (0, 8):
                for row in range(8):
                    for column in range(8):
                        thread = warp * 32 + (row * 8 + column) // 2
                        place = (warp * 16 + upper + row, block * 8 + column)
                        places[thread, registers[thread]] = place
                        registers[thread] += 1
    return places


def test_fragments(library):
    for (thread, i), place in fragment(32).items():
        assert (library.fragment_row_of(thread, i), library.fragment_column_of(thread, i)) == place


# ---- Dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (64, 80)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_bits(library, rows, columns, transposed, p):
    seed, batch, head, first_row, first_column = -(2**40) - 3, 5, 3, 2**20 + 48, 2**33 + 16
    if transposed:
        first_row, first_column = first_column, first_row
    keep = torch.empty(rows, columns, dtype=torch.bool)
    library.dropout_tile(
        rows, transposed, seed % 2**64, rng.threshold(p), batch, head, first_row, first_column,
        keep.data_ptr(),
    )  # fmt: skip
    sizes, offsets = (rows, columns), (first_row, first_column)
    if transposed:
        keep, sizes, offsets = keep.T, sizes[::-1], offsets[::-1]
    truth = rng.attention_keep(torch.tensor(seed), p, (1, 1, *sizes), (batch, head, *offsets))
    assert torch.equal(keep, truth[0, 0])


# ---- As a compiler for the chip has it -----------------------------------------------------------

A, B, C, OUT = ((i + 1) << 32 for i in range(4))


@pytest.fixture(scope="module")
def triton_products(tmp_path_factory):
    """What triton_products.py prints."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = hopper_calls.FOLDER / "triton_products.py"
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def products(triton_products):
    """What Triton's kernels do, beside their constants."""
    try:
        return [
            (case, ptx_products.Run(case["ptx"], [A, B, C, OUT, 0, 0]))
            for case in triton_products["plain"]
        ]
    except ptx_products.UnknownInstructionError as error:
        pytest.skip(f"this Triton's PTX has an instruction that is not known here: {error}")


def tile_at(run, first, rows, columns, library):
    """Where a tile of 16-bit elements lies in shared memory; it lies there as layouts.h says."""
    base = min(place for place, word in run.shared.items() if first <= word < first + (1 << 32))
    for row in range(rows):
        for column in range(0, columns, 2):
            place = base + library.tile_byte_of(rows, row, column)
            assert run.shared[place] == first + (row * columns + column) * 2
    return base


@pytest.mark.slow
def test_descriptors_as_triton_has_them(library, products):
    for case, run in products:
        if case["CHAIN"]:
            continue
        N, K, transposes = case["N"], case["K"], (case["TRANSPOSE_A"], case["TRANSPOSE_B"])
        shapes = [(64, K), (N, K)]
        rows = [s[transpose] for s, transpose in zip(shapes, transposes, strict=True)]
        columns = [s[not transpose] for s, transpose in zip(shapes, transposes, strict=True)]
        at = [tile_at(run, *tile, library) for tile in zip((A, B), rows, columns, strict=True)]
        assert len(run.products) == K // 16
        for k, asked in enumerate(run.products):
            assert asked["shape"] == f"m64n{N}k16"
            assert asked["transposes"] == transposes
            for i, name in enumerate("ab"):
                if not transposes[i]:
                    mine = library.k_major(at[i], rows[i], k)
                else:
                    mine = library.transposed(at[i], rows[i], k)
                    if shapes[i][0] == 64:  # one panel: where the next one is, is not looked at
                        mine &= ~(0x3FFF << 16)
                assert asked[name] == mine, (transposes, k, name)


@pytest.mark.slow
def test_tiles_of_tma_as_triton_has_them(library, triton_products):
    """Boxes of TMA lie as the tiles above do: their descriptors are the same."""
    for case in triton_products["tma"]:
        # 128-byte swizzle; boxes are panels.
        assert [(m["swizzle"], m["block_size"]) for m in case["maps"][:2]] == [
            (3, [64, 64]), (3, [128, 64]),
        ]  # fmt: skip
        # Added to each tile's address.
        found = re.findall(r"(?:or|add)\.\w+\s+%rd\d+, %rd\d+, (4611686\d{12});", case["ptx"])
        of_b = library.transposed if case["TRANSPOSE_B"] else library.k_major
        mine = [(library.k_major(0, 64, k), of_b(0, 128, k)) for k in range(8)]
        assert list(map(int, found)) == [descriptor for pair in mine for descriptor in pair]


@pytest.mark.slow
def test_fragments_as_triton_has_them(library, products):
    for case, run in products:
        N = case["N"]
        assert len(run.stored) == 64 * N
        for row in range(64):
            for column in range(N):
                thread, i = run.stored[OUT + (row * N + column) * 4]
                mine = library.fragment_row_of(thread, i), library.fragment_column_of(thread, i)
                assert mine == (row, column)
        # An accumulator as the next product's operand a.
        if case["CHAIN"]:
            chained = run.products[case["K"] // 16 :]
            assert len(chained) == N // 16
            for k, asked in enumerate(chained):
                for thread, words in enumerate(asked["a"]):
                    pairs = [tuple((thread, 8 * k + 2 * r + e) for e in (0, 1)) for r in range(4)]
                    assert words == pairs


def disassembly(cubin: Path) -> str:
    """Its SASS, by the tool of nvcc's or of Triton's."""
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    for folder in triton.submodule_search_locations if triton else ():
        folders.append(f"{folder}/backends/nvidia/bin")
    tool = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if tool is None:
        pytest.skip("there is no cuobjdump here")
    return subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_nvcc_makes_the_instructions(tmp_path):
    """Every function of hopper.h, without a warning, as the instruction that it is for."""
    try:
        nvcc = native_build_cuda.find_nvcc()
    except BuildError as reason:
        pytest.skip(str(reason))


    def compiled(*options):
        command = [nvcc.path, "-std=c++17", f"-I{hopper_calls.CUDA}", *options]
        command.append(hopper_calls.FOLDER / "wrappers.cu")
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    target = "-gencode=arch=compute_90a,code=sm_90a"
    said = compiled(target, "-Xptxas=-v", "-cubin", "-o", tmp_path / "cubin")
    for word in ("warning", "Potential Performance Loss"):
        assert word not in said, said
    # No register array has ended in memory.
    assert len(re.findall(r"(\d+) bytes stack frame", said)) == 17
    assert set(re.findall(r"(\d+) bytes (?:stack frame|spill)", said)) == {"0"}

    sass = disassembly(tmp_path / "cubin")
    form = r"HGMMA\.64x(\d+)x16\.F32(\.BF16)? R\d+, (?:(R)\d+, )?gdesc\[\w+\](\.tnspA)?(\.tnspB)?"
    products = Counter(re.findall(form, sass))
    for n in range(16, 257, 16):
        for kind in ("", ".BF16"):
            for a, b in product(("", ".tnspA"), ("", ".tnspB")):
                assert products[str(n), kind, "", a, b] == 1
                assert products[str(n), kind, "R", a, b] == (not a)
    instructions = (
        "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR", "UTMALDG.4D", "UTMASTG.4D", "UBLKCP", "UBLKRED",
        "SYNCS", "USETMAXREG", "STSM.16.M88.4", "STSM.16.MT88.4", "FENCE.VIEW.ASYNC", "ELECT",
    )  # fmt: skip
    for instruction in instructions:
        assert instruction in sass, instruction

    # What ptxas may put there by itself: for each of 16 sizes and two types.
    compiled("-arch=compute_90a", "-ptx", "-o", tmp_path / "ptx")
    ptx = (tmp_path / "ptx").read_text()
    for instruction in ("fence", "commit_group", "wait_group"):
        assert ptx.count(f"wgmma.{instruction}.sync.aligned") == 32
    # And what leaves no trace of its own.
    assert ptx.count("fence.proxy.async.shared::cta;") == 2
    for instruction in ("fence.mbarrier_init", "bulk.wait_group.read 0", "bulk.wait_group 0"):
        assert instruction in ptx
