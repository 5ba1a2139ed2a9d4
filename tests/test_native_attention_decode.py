"""The C++ kernel of one query, as decoding has it: beside float64, in each instruction set."""

import pytest
import torch
from backends import ROW_BACKENDS
from bounds import assert_within_bound

from fusedformer import attention

pytestmark = [
    pytest.mark.skipif("cpu" not in ROW_BACKENDS, reason="there is no C++ library here, or a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

# Batch, heads, heads of keys, keys, D: around vectors (16), parts of 256 keys and the 8 heads of
# queries that a part takes at once; D of one vector, of several at once and of what is left over.
SIZES = [
    (1, 1, 1, 1, 1), (2, 2, 2, 15, 15), (1, 2, 1, 16, 16), (2, 3, 1, 17, 33), (1, 4, 1, 255, 64),
    (1, 6, 1, 256, 65), (2, 8, 1, 257, 80), (1, 9, 1, 600, 128), (1, 10, 2, 513, 256),
]  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def inputs(batch, heads, key_heads, keys, dim, dtype):
    return [
        torch.randn(batch, h, n, dim).to(dtype)
        for h, n in ((heads, 1), (key_heads, keys), (key_heads, keys))
    ]


def check(query, key, value, **options):
    found = attention(query, key, value, **options, return_lse=True, backend="cpu")
    double = [x.double() for x in (query, key, value)]
    if (lengths := options.get("key_lengths")) is not None:  # what lies past them may be NaN
        past = torch.arange(key.shape[2]) >= lengths[:, None]
        key, value = (x.masked_fill(past[:, None, :, None], 0) for x in (key, value))
        double[1:] = key.double(), value.double()
    eager = attention(query, key, value, **options, return_lse=True, backend="reference")
    truth = attention(*double, **options, return_lse=True, backend="reference")
    for name, *three in zip(("O", "LSE"), found, eager, truth, strict=True):
        assert_within_bound(name, *three)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(isa, dtype):
    torch.manual_seed(0)
    for sizes in SIZES:
        tensors = inputs(*sizes, dtype)
        check(*tensors)
        check(*tensors, causal=True, scale=-0.3)
        # Of the keys those that are not after the query's position, and of them a row's own.
        check(*tensors, causal=True, offsets=(0, 0, sizes[3] // 32 * 16, 0))
        lengths = torch.randint(0, sizes[3] + 1, (sizes[0],))
        lengths[0] = sizes[3] // 2
        for x in tensors[1:]:
            x[torch.arange(sizes[3]).expand(*x.shape[:2], -1) >= lengths[:, None, None]] = torch.nan
        check(*tensors, key_lengths=lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(isa, dtype):
    """Parts of a cache, parts of a projection, and strides that are copied."""
    torch.manual_seed(0)
    query = torch.randn(2, 3, 1, 40, dtype=dtype)
    cache = torch.randn(2, 2, 3, 500, 40, dtype=dtype)
    check(query, *cache[:, :, :, 100:399])
    projected = torch.randn(2, 299, 3 * 3 * 40, dtype=dtype)
    key, value = (x.view(2, 299, 3, 40).transpose(1, 2) for x in projected.chunk(3, -1)[1:])
    check(query, key, value)
    turned = torch.randn(2, 2, 3, 40, 299, dtype=dtype).transpose(3, 4)
    check(torch.randn(2, 3, 40, 1, dtype=dtype).transpose(2, 3), *turned)
    check(query.transpose(0, 1)[:1, :1].expand(2, 3, 1, 40), *cache)


def test_nothing_to_attend_to(isa):
    for keys in (1, 300):
        query, key, value = inputs(2, 4, 2, keys, 24, torch.float32)
        key[0], value[0] = torch.nan, torch.nan
        out, lse = check(query, key, value, key_lengths=torch.tensor([0, keys]))
        assert (out[0] == 0).all()
        assert (lse[0] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(isa, dtype):
    """The largest in one part, the others far below it; and products beyond all numbers."""
    torch.manual_seed(0)
    query, key, value = inputs(1, 2, 2, 700, 32, dtype)
    key[:, :, 300] = 200 * query[:, :, 0]
    out, _ = check(query, key, value)
    assert torch.equal(out[:, :, 0], value[:, :, 300])
    if dtype == torch.float32:
        key[:, :, :256] = -1e38 * query.sign()  # a whole part of -inf counts for nothing
        query *= 1e3
        out, _ = attention(query, key, value, return_lse=True, backend="cpu")
        assert torch.equal(out[:, :, 0], value[:, :, 300])


def test_a_nan_spoils_its_own_heads_alone(isa):
    torch.manual_seed(0)
    query, key, value = inputs(2, 4, 2, 600, 32, torch.float32)
    clean = attention(query, key, value, backend="cpu")
    for spoilt in (key, value):
        kept = spoilt[1, 0, 500, 7].clone()
        spoilt[1, 0, 500, 7] = torch.nan
        out = attention(query, key, value, backend="cpu")
        spoilt[1, 0, 500, 7] = kept
        bad = torch.zeros(2, 4, 1, 32, dtype=torch.bool)
        bad[1, :2, :, slice(None) if spoilt is key else 7] = True
        assert torch.equal(out.isnan(), bad)
        assert torch.equal(out[~bad], clean[~bad])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alone_in_a_batch_and_with_any_number_of_threads_the_bits_are_the_same(isa, dtype):
    torch.manual_seed(0)
    query, key, value = inputs(3, 6, 2, 2100, 64, dtype)
    threads, found = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(attention(query, key, value, backend="cpu"))
    torch.set_num_threads(threads)
    assert found[0].isfinite().all()
    assert all(torch.equal(found[0], other) for other in found[1:])
    for row in range(3):
        part = slice(row, row + 1)
        alone = attention(query[part], key[part], value[part], backend="cpu")
        assert torch.equal(alone, found[0][part])
