"""The row kernels read and write each tensor once, 16 bytes at a time: counted in machine code."""

import pytest
import torch

pytest.importorskip("triton")
import accesses

from fusedformer import aot

BF16, FP32 = torch.bfloat16, torch.float32
BYTES = {BF16: 2, FP32: 4}
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def of_op():
    with aot.worker_pool(1) as pool:
        yield lambda *args: pool.submit(accesses.of_op, *args).result()


def _elements(options: dict) -> int:
    """Of a tile, for each thread."""
    columns = options.get("COLUMNS") or options["BLOCK"] * options.get("BLOCKS", 1)
    return options.get("ROWS", 1) * columns // (32 * options["num_warps"])


def _narrow(found: dict, name: str) -> int:
    return sum(n for (what, size), n in found.items() if what == name and size < 16)


# 1000 is a multiple of 8 but not of 16; 768 and 1000 are no powers of two.
@pytest.mark.parametrize(
    ("width", "dtype", "prenorm", "dropped"),
    [
        (768, BF16, False, True),
        (768, FP32, False, True),
        (1000, BF16, True, True),
        (1000, FP32, False, False),
        (1024, BF16, False, False),
        (4096, BF16, False, True),
        (4096, FP32, True, True),
        (8192, BF16, False, True),
        (8192, BF16, True, True),
    ],
    ids=str,
)
def test_layer_norm(of_op, width, dtype, prenorm, dropped):
    kernels = of_op("layer_norm", width, dtype, prenorm, dropped)
    x, z = BYTES[dtype], 4 if prenorm else BYTES[dtype]
    found, options = kernels["layer_norm_fwd_kernel"]
    elements = _elements(options)
    vectors = 2 * 4 * options["BLOCK"] * options["BLOCKS"] // (32 * options["num_warps"])
    assert found["LDG", 16] == (elements * (x + z) + vectors) // 16
    assert found["STG", 16] == elements * (x + z * prenorm) // 16
    assert _narrow(found, "LDG") <= dropped * (options["BLOCKS"] if prenorm else 1)  # the seed
    assert _narrow(found, "STG") == 2  # mean and rstd

    found, options = kernels["layer_norm_bwd_kernel"]
    elements = _elements(options)
    # Before norm, z and the gradients of y and z; after it, x, residual and the gradient of y.
    tiles = elements * (x + 2 * z if prenorm else 2 * x + z) // 16
    weight = 4 * elements // options["ROWS"] // 16
    if width > 4096 and dropped and not prenorm:  # not held, but read with each tile
        tiles, weight = tiles + weight, 0
    staged = options["STAGES"] > 1
    assert found["LDG", 16] == weight + tiles * (not staged)
    assert found["LDGSTS", 16] == 2 * tiles * staged  # before the loop, and in it
    assert _narrow(found, "LDG") <= dropped + 2 * (not staged)
    assert found["STG", 16] == (elements * (x + z) + 2 * 4 * elements // options["ROWS"]) // 16
    assert _narrow(found, "STG") == 0


@pytest.mark.parametrize("width", [768, 1000, 4096])
@DTYPES
def test_dropout(of_op, width, dtype):
    ((found, options),) = of_op("dropout", width, dtype).values()
    tile = _elements(options) * BYTES[dtype] // 16
    assert (found["LDG", 16], found["STG", 16]) == (tile, tile)
    assert (_narrow(found, "LDG"), _narrow(found, "STG")) == (1, 0)  # the seed


@pytest.mark.parametrize("width", [768, 1000, 4096])
@DTYPES
def test_bias_activation(of_op, width, dtype):
    kernels = of_op("bias_activation", width, dtype)
    found, options = kernels["_bias_activation_fwd_kernel"]
    tile = _elements(options) * BYTES[dtype] // 16
    assert (found["LDG", 16], found["STG", 16]) == (tile, tile)
    assert _narrow(found, "LDG") <= 3  # the seed and the bias
    assert _narrow(found, "STG") == 0
    found, options = kernels["_bias_activation_bwd_kernel"]
    assert found["LDGSTS", 16] == 2 * 2 * tile  # before the loop, and in it
    assert (found["LDG", 16], found["STG", 16]) == (0, tile)
    assert _narrow(found, "LDG") <= 3
    assert _narrow(found, "STG") <= 1  # sums for the bias


@pytest.mark.parametrize("width", [768, 1000, 4096, 32768])
@DTYPES
def test_cross_entropy(of_op, width, dtype):
    (forward, options), (backward, back) = of_op("cross_entropy", width, dtype).values()
    # A wide row's first block, those between and the last one are apart; in the backward all alike.
    apart = 1 if width <= 4096 else 3
    assert forward["LDG", 16] == apart * _elements(options) * BYTES[dtype] // 16
    assert forward["STG", 16] == 0
    tile = _elements(back) * BYTES[dtype] // 16
    assert (backward["LDG", 16], backward["STG", 16]) == (tile, tile)
    assert _narrow(forward, "LDG") <= 5  # target and its logit, of a row or two, and what they need
    assert _narrow(backward, "LDG") <= 6
    assert _narrow(backward, "STG") == 0
