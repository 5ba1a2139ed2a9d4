"""The C++ kernel of linear layers of few rows: beside float64, in each instruction set."""

import pytest
import torch
from backends import ROW_BACKENDS
from bounds import assert_within_bound
from layouts import LAYOUTS, matrix
from torch.nn import functional

from fusedformer.kernels import native

pytestmark = [
    pytest.mark.skipif("cpu" not in ROW_BACKENDS, reason="there is no C++ library here, or a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

# Rows, columns and width: of one, around the kernel's vectors (16 and 32) and its blocks of 16
# columns, and beyond what it reads of some rows at a time.
SIZES = [
    (1, 1, 1), (1, 17, 5), (2, 31, 15), (3, 33, 16), (4, 16, 33), (5, 19, 511), (6, 2, 512),
    (7, 20, 513), (8, 37, 1041), (1, 18, 4128), (9, 16, 1025), (17, 47, 30),
]  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(x, weight, bias=None):
    found = native.linear(x, weight, bias)
    eager = functional.linear(x, weight, bias)
    truth = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.is_contiguous()
    assert found.dtype == x.dtype
    assert_within_bound("linear", found, eager, truth)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(isa, dtype):
    torch.manual_seed(0)
    for rows, columns, width in SIZES:
        x, weight = torch.randn(rows, width), torch.randn(columns, width)
        bias = torch.randn(columns).to(dtype)
        check(x.to(dtype), weight.to(dtype), bias)
        check(x.to(dtype), weight.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(isa, dtype):
    torch.manual_seed(0)
    for layout in LAYOUTS:
        x = matrix(layout, 3, 70, dtype=dtype)
        weight = matrix("contiguous" if layout == "two of rows" else layout, 21, 70, dtype=dtype)
        check(x, weight, torch.randn(42, dtype=dtype)[::2])
    check(torch.randn(70, dtype=dtype), weight)
    check(torch.randn(1, 2, 3, 70, dtype=dtype), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_alone_and_in_any_batch(isa, dtype):
    torch.manual_seed(0)
    for columns, width in ((37, 70), (21, 1300)):
        x = torch.randn(19, width, dtype=dtype)
        weight, bias = torch.randn(columns, width, dtype=dtype), torch.randn(columns, dtype=dtype)
        alone = torch.cat([native.linear(row[None], weight, bias) for row in x])
        for rows in (2, 3, 4, 5, 7, 8, 9, 16, 19):
            assert torch.equal(native.linear(x[:rows], weight, bias), alone[:rows]), rows


def test_any_number_of_threads_gives_the_same_bits(isa):
    """With weights enough for each to have several pieces, and pieces that do not divide them."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 600), torch.randn(1501, 600)
    threads, found = torch.get_num_threads(), []
    for n in (1, 2, 3, 8):
        torch.set_num_threads(n)
        found.append(native.linear(x, weight, None))
    torch.set_num_threads(threads)
    assert found[0].isfinite().all()
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_beside_is_not_read(isa, dtype):
    """Rows amid NaN: nothing of it reaches a result, wherever vectors end."""
    torch.manual_seed(0)
    for width in (1, 15, 16, 17, 31, 33, 63, 65, 100):
        whole = [torch.full((n + 2, width + 64), torch.nan, dtype=dtype) for n in (3, 18)]
        x, weight = (matrix[1:-1, 32 : 32 + width] for matrix in whole)
        x.normal_()
        weight.normal_()
        bias = torch.full((20,), torch.nan, dtype=dtype)[1:-1].normal_()
        check(x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_row_and_column(isa, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 70, dtype=dtype), torch.rand(21, 70, dtype=dtype) + 1
    clean = native.linear(x, weight, None)
    for place in (0, 40, 69):
        bad, infinite = x.clone(), x.clone()
        bad[2, place], infinite[2, place] = torch.nan, -torch.inf
        others = [0, 1, 3, 4]
        for found in (native.linear(bad, weight, None), native.linear(infinite, weight, None)):
            assert torch.equal(found[others], clean[others])
        assert native.linear(bad, weight, None)[2].isnan().all()
        assert (native.linear(infinite, weight, None)[2] == -torch.inf).all()
        bad = weight.clone()
        bad[20, place] = torch.nan
        found = native.linear(x, bad, None)
        assert torch.equal(found[:, :20], clean[:, :20])
        assert found[:, 20].isnan().all()
    assert (native.linear(x, weight, torch.full((21,), torch.inf, dtype=dtype)) == torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_weight_counts_once(isa, dtype):
    """Whole numbers, so that the sum is exact: one row of ones counts every column of weights."""
    for width in (7, 16, 48, 530, 2100):
        weight = torch.eye(width, dtype=dtype)[: min(width, 40)]
        weight[:, -1] += 2
        x = torch.arange(1.0, width + 1).remainder(7).to(dtype).expand(3, width)
        assert torch.equal(native.linear(x, weight, None), x[:, : len(weight)] + 2 * x[:, -1:])
