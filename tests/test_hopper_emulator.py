"""The emulator that runs Hopper's kernels on a host: right products, and every mistake found.

It is written from the PTX ISA's text, without csrc/cuda/layouts.h, by which the kernel of
primitives_main.cpp goes: a right product shows that the two agree.
"""

import ctypes
import re

import hopper_calls
import pytest
import torch
from bounds import assert_within_bound

pytestmark = pytest.mark.skipif(
    hopper_calls.COMPILER is None, reason="there is no C++ compiler here"
)

# In the order of primitives_main.cpp.
MISTAKES = (
    "none", "no wait for load", "no wait for product", "release too early", "wrong parity",
    "no release", "too few bytes", "too many bytes", "accumulator not fenced",
    "accumulator written after fence", "operand changed", "no fence before store",
    "no barrier before store", "no wait for store", "no commit of store", "misaligned tile",
    "out of bounds", "generic out of bounds", "no init fence", "no init", "too many registers",
    "barrier count", "one lane at barrier", "different products", "misaligned bulk", "trap",
    "load not awaited", "spin",
)  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    emulator = hopper_calls.build_emulator(folder)
    built = hopper_calls.build_driver(
        "primitives_main.cpp", 0, folder / "primitives.so", emulator, flags=("-O1",)
    )
    built.packed.restype = ctypes.c_uint32
    built.packed.argtypes = [ctypes.c_float, ctypes.c_float, ctypes.c_int]
    return built


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pack_rounds_as_torch(library, dtype):
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20000,)).to(torch.int32)
    # Near halves of a unit in the last place, overflow, subnormals, zeros.
    near = torch.arange(-3, 4, dtype=torch.int32)[:, None] + torch.tensor(
        [0x3F808000, 0x3F801000, 0x477FF000, 0x387FF000, 0x33000000, 0x33C00000, 0x7F7F8000, 3],
        dtype=torch.int32,
    )
    x = torch.cat([bits, near.flatten()]).view(torch.float32)
    x = x[~x.isnan()]
    mine = torch.tensor(
        [library.packed(0, value, dtype == torch.bfloat16) >> 16 for value in x.tolist()]
    )
    assert torch.equal(mine, x.to(dtype).view(torch.int16).long() & 0xFFFF)


class Call(ctypes.Structure):
    """primitives_main.cpp"""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("a", "b", "out", "sum")),
        *((f"{t}_{n}", ctypes.c_int64 * 4) for t in ("a", "b", "out") for n in ("size", "stride")),
        *((n, ctypes.c_int) for n in ("depth", "bfloat16", "transpose_a", "transpose_b")),
        *((n, ctypes.c_int) for n in ("a_in_registers", "resident", "mistake")),
        ("counter", ctypes.c_void_p),
    ]  # fmt: skip


def operand(batch, heads, rows, columns, dtype):
    """(B, H, rows, columns), as a transposed view of (B, rows, H, columns)."""
    return torch.randn(batch, rows, heads, columns).to(dtype).transpose(1, 2)


def multiply(
    library, *, seed=0, mistake="none", rows=128, depth=192, dtype=torch.bfloat16,
    transpose_a=False, transpose_b=False, a_in_registers=False, heads=(2, 2), resident=1,
):  # fmt: skip
    """The emulated product's error text, or its results beside eager's and the truth."""
    torch.manual_seed(1)
    n = 128 if dtype == torch.bfloat16 else 96  # a panel and a half
    a, b = operand(*heads, rows, depth, dtype), operand(*heads, n, depth, dtype)
    stored_a = operand(*heads, depth, rows, dtype).copy_(a.mT) if transpose_a else a
    stored_b = operand(*heads, depth, n, dtype).copy_(b.mT) if transpose_b else b
    out = hopper_calls.poisoned(operand(*heads, *((n, rows) if transpose_a else (rows, n)), dtype))
    before = torch.randn(heads[0] * heads[1], 128, n)
    total = before.clone()
    counter = torch.zeros((), dtype=torch.int32)
    arrays = [
        (ctypes.c_int64 * 4)(*numbers)
        for tensor in (stored_a, stored_b, out)
        for numbers in (tensor.shape, tensor.stride())
    ]
    call = Call(
        stored_a.data_ptr(), stored_b.data_ptr(), out.data_ptr(), total.data_ptr(), *arrays,
        depth, dtype == torch.bfloat16, transpose_a, transpose_b, a_in_registers, resident,
        MISTAKES.index(mistake), counter.data_ptr(),
    )  # fmt: skip
    error = ctypes.create_string_buffer(20000)
    if library.product(
        ctypes.byref(call), ctypes.c_uint64(seed), error, ctypes.c_size_t(len(error))
    ):
        return error.value.decode()
    truth, eager = a.double() @ b.double().mT, a @ b.mT
    eager32 = (a.float() @ b.float().mT).flatten(0, 1)
    before, total = before[:, :rows], total[:, :rows]
    return [
        ("out", out.mT if transpose_a else out, eager, truth),
        ("sum", total, before + eager32, before.double() + truth.flatten(0, 1)),
    ]


def check(library, **how):
    result = multiply(library, **how)
    assert not isinstance(result, str), result
    for name, actual, eager, truth in result:
        assert_within_bound(name, actual, eager, truth)


@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("a", ["plain", "transposed", "in registers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_product(library, dtype, a, transpose_b):
    check(
        library, dtype=dtype, transpose_a=a == "transposed", a_in_registers=a == "in registers",
        transpose_b=transpose_b,
    )  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        {"depth": 80},  # the second step reads zeros past the end
        {"rows": 104, "transpose_a": True},
        {"depth": 24, "transpose_b": True, "dtype": torch.float16},
        {"rows": 72, "depth": 264, "transpose_b": True, "resident": 3},
    ],
    ids=str,
)
def test_product_of_odd_sizes(library, case):
    check(library, **case)


@pytest.mark.parametrize("seed", range(6))
def test_product_in_any_order_of_events(library, seed):
    check(library, seed=seed, resident=1 + seed % 3, transpose_b=True, a_in_registers=True)


# What the emulator says to each mistake, whatever the seed.
SAID = {
    "wrong parity": "deadlock.*mbarrier at byte",
    "no release": "deadlock.*mbarrier at byte .*256 arrivals",
    "too few bytes": "64 bytes landed that were not expected",
    "too many bytes": "deadlock.*64 bytes missing",
    "accumulator not fenced": "accumulator was not named in a wgmma_fence",
    "accumulator written after fence": "accumulator was written after the wgmma_fence",
    "no fence before store": r"without fence_async\(\)",
    "no commit of store": "ends without tma_commit",
    "misaligned tile": "not 1024-byte aligned",
    "out of bounds": "tma_load: bytes .* of shared memory, which has",
    "generic out of bounds": "writes past its .* bytes of shared memory",
    "no init fence": r"no mbarrier_init_fence\(\)",
    "no init": "no mbarrier was initialised at byte",
    "too many registers": "deadlock.*232 registers",
    "barrier count": "barrier .: .* threads, where others said",
    "one lane at barrier": "deadlock.*rest of its warp at a named barrier",
    "different products": "ask for different products",
    "misaligned bulk": "bulk_reduce_add: addresses and size must be multiples of 16",
    "trap": r"thread 300 .*trap\(\) was called",
    "load not awaited": "nobody has waited for the last load",
    "spin": r"load_acquire\(\) was called in vain",
}
# These are found where the seed's order brings them out.
RACES = {
    "no wait for load": False,
    "no wait for product": False,
    "release too early": False,
    "operand changed": True,
    "no barrier before store": False,
    "no wait for store": False,
}


@pytest.mark.parametrize("mistake", SAID)
def test_mistake_is_found(library, mistake):
    result = multiply(library, mistake=mistake, heads=(1, 1))
    assert isinstance(result, str)
    assert re.search(SAID[mistake], result, re.DOTALL), result


@pytest.mark.parametrize("mistake", RACES)
def test_race_is_found(library, mistake):
    found = 0
    for seed in range(8):
        result = multiply(
            library, mistake=mistake, seed=seed, a_in_registers=RACES[mistake], heads=(1, 1)
        )
        try:
            assert not isinstance(result, str)
            for name, actual, eager, truth in result:
                assert_within_bound(name, actual, eager, truth)
        except AssertionError:
            found += 1
    assert found >= 2
