"""Attention's errors: each names the argument, what was got and what is wanted."""

import math

import pytest
import torch

from fusedformer import attention, scaled_dot_product_attention

Q = torch.randn(2, 4, 6, 8)
KV = torch.randn(2, 2, 5, 8)
META = torch.randn(2, 2, 5, 8, device="meta")

BAD = [
    ({"query": [1.0]}, TypeError, "query must be a tensor; got list"),
    ({"query": Q.int()}, TypeError, "query must be float32.*got torch.int32"),
    ({"query": Q[0]}, ValueError, r"query must be \(B, H, N, D\); got \(4, 6, 8\)"),
    ({"key": KV.half()}, TypeError, "key must have the dtype of query, torch.float32.*float16"),
    ({"key": META}, ValueError, "key must be on the device of query, cpu; got meta"),
    ({"key": KV[:1]}, ValueError, r"key must have the batch size 2.*\(1, 2, 5, 8\)"),
    ({"key": KV[..., :7]}, ValueError, r"key .*the head dimension 8.*\(2, 2, 5, 7\)"),
    ({"value": KV[:, :, :4]}, ValueError, r"value must have the heads and the length of key"),
    ({"query": torch.randn(2, 3, 6, 8)}, ValueError, r"heads of query \(3\).*multiple.*got 2"),
    (
        {"query": torch.randn(1, 1, 2, 257), "key": torch.randn(1, 1, 2, 257)},
        ValueError,
        "head dimension must be 1 to 256; query has 257",
    ),
    ({"mask": torch.ones(3, 5)}, ValueError, r"mask must broadcast to \(2, 4, 6, 5\).*\(3, 5\)"),
    ({"mask": torch.ones(1, 1, 1, 6, 5)}, ValueError, "mask must broadcast"),
    ({"mask": torch.ones(6, 5, dtype=torch.int32)}, TypeError, "mask must be bool or floating"),
    ({"mask": torch.ones(6, 5).double()}, TypeError, "float64 mask needs a float64 query"),
    ({"mask": torch.ones(6, 5, device="meta")}, ValueError, "mask must be on the device of query"),
    ({"key_lengths": torch.tensor([1.0, 2.0])}, TypeError, "key_lengths must be int32 or int64"),
    ({"key_lengths": torch.tensor([1])}, ValueError, r"key_lengths must be \(2,\).*got \(1,\)"),
    ({"key_lengths": torch.tensor([1, 6])}, ValueError, r"key_lengths.* 0 and .*, 5; .*1 to 6"),
    ({"key_lengths": torch.tensor([1, 200])}, ValueError, "got values from 1 to 200"),
    ({"key_lengths": torch.tensor([1, 2**32 + 3])}, ValueError, "key_lengths must be between 0"),
    ({"query": [1.0], "causal": True}, TypeError, "query must be a tensor; got list"),
    ({"key": None, "causal": True}, TypeError, "key must be a tensor; got NoneType"),
    ({"scale": "x"}, TypeError, "scale must be a number; got 'x'"),
    ({"scale": math.nan}, ValueError, "scale must be finite; got nan"),
    ({"seed": "x"}, TypeError, "seed must be an int or a 0-d int64 tensor; got 'x'"),
    ({"offsets": 7}, ValueError, "offsets must be four ints.*got 7"),
    ({"offsets": (0, 0, 16.0, 0)}, TypeError, "offsets must be ints"),
    (
        {"offsets": (0, 2**16 - 3, 0, 0), "dropout_p": 0.1},
        ValueError,
        r"head positions must stay below 2\^16; got 4 from offset 65533",
    ),
    ({"offsets": (2**32, 0, 0, 0), "dropout_p": 0.1}, ValueError, r"batch .* below 2\^32"),
    ({"offsets": (0, 0, 2**34, 0), "dropout_p": 0.1}, ValueError, r"query .* below 2\^34"),
    ({"backend": ["triton"]}, ValueError, "backend must be one of"),
    ({"key_lengths": torch.tensor([-1, 2])}, ValueError, "key_lengths must be between 0 and"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p must be from 0 to 1; got -0.1"),
    ({"dropout_p": 1.1}, ValueError, "dropout_p must be from 0 to 1; got 1.1"),
    ({"dropout_p": math.nan}, ValueError, "dropout_p must be from 0 to 1; got nan"),
    ({"dropout_p": "half"}, TypeError, "dropout_p must be a number"),
    ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed must be an int or a 0-d int64 tensor"),
    ({"dropout_p": 0.1, "seed": 2**64}, ValueError, "seed must fit in 64 bits"),
    ({"dropout_p": 0.1, "seed": torch.tensor([1])}, ValueError, r"seed must be .* got a \(1,\)"),
    ({"offsets": (0, 0, 8, 0)}, ValueError, "offsets.*multiples of 16"),
    ({"offsets": (0, 0, True, 0)}, TypeError, "offsets must be ints"),
    ({"offsets": (0, 0, 2**63 - 16, 0)}, ValueError, r"offsets must be below 2\^62"),
    ({"offsets": (0, -1, 0, 0)}, ValueError, "offsets must not be negative"),
    ({"offsets": (0, 0)}, ValueError, "offsets must be four ints"),
    ({"backend": "cudnn"}, ValueError, "backend must be one of reference, triton.*'cudnn'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[str(b[2])[:40] for b in BAD])
def test_bad_input(change, error, message):
    arguments = {"query": Q, "key": KV, "value": KV, **change}
    if arguments["query"] is not Q and "key" in change:
        arguments["value"] = arguments["key"]
    with pytest.raises(error, match=message) as raised:
        attention(**arguments)
    assert str(raised.value).startswith("attention: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_mask": torch.ones(6, 5), "is_causal": True}, "attn_mask must be None"),
        ({"key": KV}, r"must be the same or 1, heads only with enable_gqa; got \(2, 4, 6, 8"),
        ({"key": Q[0, 0, 0]}, r"key must have 2 dimensions or more; got \(8,\)"),
        ({"key": Q[0, 0], "enable_gqa": True}, r"key must have 3 dimensions or more; got \(6, 8\)"),
        (
            {"attn_mask": torch.ones(6, 5)},
            r"attn_mask must broadcast to \(2, 4, 6, 6\); got \(6, 5\)",
        ),
    ],
)
def test_bad_input_of_the_sdpa_shim(change, message):
    with pytest.raises(ValueError, match=message):
        scaled_dot_product_attention(**{"query": Q, "key": Q, "value": Q, **change})
