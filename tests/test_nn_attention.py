"""MultiheadAttention beside torch's, on the same parameters, option by option."""

import warnings

import pytest
import torch
from nn_cases import assert_agree, outputs_and_gradients, twins
from pairwise import describe, pairwise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedformer
from fusedformer.nn import attention as module

pytestmark = [
    pytest.mark.usefixtures("on_device"),
    # torch's, of masks of two types.
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.filterwarnings("ignore:MultiheadAttention. need_weights"),
]

MultiheadAttention = fusedformer.nn.MultiheadAttention

OPTIONS = {
    "dtype": [torch.float32, torch.bfloat16],
    "layout": ["batch first", "batch second", "no batch"],
    "inputs": ["self", "memory", "three"],
    "widths": [(None, None), (24, None), (40, 12)],
    "heads": [1, 4],
    "bias": [True, False],
    "extra": [None, "bias", "zero", "both"],
    "padding": [None, "bool", "float"],
    "mask": [None, "bool", "float", "bool by head", "float by head"],
    "weights": [None, "averaged", "by head"],
}

CASES = pairwise(OPTIONS)
WIDTH, BATCH, QUERIES, KEYS = 64, 3, 37, 43


def make(cls: type, case: dict) -> torch.nn.Module:
    kdim, vdim = case["widths"]
    return cls(
        WIDTH, case["heads"], bias=case["bias"], add_bias_kv=case["extra"] in ("bias", "both"),
        add_zero_attn=case["extra"] in ("zero", "both"), kdim=kdim, vdim=vdim,
        batch_first=case["layout"] == "batch first",
    )  # fmt: skip


def rows(case: dict, length: int, width: int) -> Tensor:
    shapes = {
        "batch first": (BATCH, length, width),
        "batch second": (length, BATCH, width),
        "no batch": (length, width),
    }
    return torch.randn(shapes[case["layout"]], dtype=case["dtype"])


def make_inputs(case: dict) -> dict[str, Tensor]:
    """query, key, value, key_padding_mask and attn_mask; those not there mean another given."""
    kdim, vdim = (width or WIDTH for width in case["widths"])
    inputs = {"query": rows(case, QUERIES, WIDTH)}
    if case["inputs"] == "three" or kdim != vdim:
        inputs |= {"key": rows(case, KEYS, kdim), "value": rows(case, KEYS, vdim)}
    elif case["inputs"] == "memory" or kdim != WIDTH:
        inputs |= {"key": rows(case, KEYS, kdim)}
    batch = 1 if case["layout"] == "no batch" else BATCH
    keys = KEYS if "key" in inputs else QUERIES
    if case["padding"]:
        hidden = torch.arange(keys) >= torch.tensor([5, keys, 3])[:batch, None]
        if case["padding"] == "float":
            hidden = torch.randn(batch, keys, dtype=case["dtype"]).masked_fill(hidden, -torch.inf)
        inputs["key_padding_mask"] = hidden[0] if case["layout"] == "no batch" else hidden
    if case["mask"]:
        by_head = "by head" in case["mask"]
        shape = (batch * case["heads"], QUERIES, keys) if by_head else (QUERIES, keys)
        hidden = torch.rand(shape) > 0.6
        hidden[..., :2] = False  # torch gives NaN where nothing is left
        if "float" in case["mask"]:
            hidden = torch.randn(shape, dtype=case["dtype"]).masked_fill(hidden, -torch.inf)
        inputs["attn_mask"] = hidden
    return inputs


def run(attention: torch.nn.Module, query: Tensor, key=None, value=None, **options) -> tuple:
    key = query if key is None else key
    return attention(query, key, key if value is None else value, **options)


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_agrees_with_torch(case):
    ours, theirs = twins(
        make(MultiheadAttention, case), make(torch.nn.MultiheadAttention, case), case["dtype"]
    )

    def call(attention, **inputs):
        return run(
            attention, need_weights=case["weights"] is not None,
            average_attn_weights=case["weights"] == "averaged", **inputs,
        )  # fmt: skip

    assert_agree(ours, theirs, call, make_inputs(case), terms=1.0)
    assert call(ours, **make_inputs(case))[0].is_contiguous()


# --- What torch's has not -------------------------------------------------------------------------


def plain(**changes) -> tuple[torch.nn.Module, torch.nn.Module]:
    case = {name: values[0] for name, values in OPTIONS.items()} | {"heads": 4} | changes
    return twins(
        make(MultiheadAttention, case), make(torch.nn.MultiheadAttention, case), torch.float32
    )


@pytest.mark.parametrize("extra", [None, "both"])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("keys", [QUERIES, KEYS])
def test_is_causal_needs_no_mask(extra, weights, keys):
    ours, theirs = plain(extra=extra)
    query, key = torch.randn(BATCH, QUERIES, WIDTH), torch.randn(BATCH, keys, WIDTH)
    hidden = torch.ones(QUERIES, keys, dtype=torch.bool).triu(1)
    hint = torch.randn(QUERIES, keys) if keys == QUERIES else hidden  # not read where square

    def call(attention, query, key):
        if attention is ours:
            return run(ours, query, key, is_causal=True, need_weights=weights)
        return run(attention, query, key, attn_mask=hidden, need_weights=weights)

    assert_agree(ours, theirs, call, {"query": query, "key": key}, terms=1.0)
    hinted = run(ours, query, key, is_causal=True, need_weights=False, attn_mask=hint)[0]
    torch.testing.assert_close(hinted, call(ours, query, key)[0])


@pytest.mark.parametrize("extra", [None, "both"])
def test_key_lengths_are_padding_on_the_right(extra):
    ours, theirs = plain(extra=extra)
    lengths = torch.tensor([4, KEYS, 1])
    inputs = {"query": torch.randn(BATCH, QUERIES, WIDTH), "key": torch.randn(BATCH, KEYS, WIDTH)}

    def call(attention, **inputs):
        if attention is ours:
            return run(ours, key_lengths=lengths, **inputs)
        return run(attention, key_padding_mask=torch.arange(KEYS) >= lengths[:, None], **inputs)

    assert_agree(ours, theirs, call, inputs, terms=1.0)


def test_a_query_with_nothing_to_attend_to():
    """torch gives NaN, we give zeros, and no gradient through them."""
    ours, _ = plain()
    query = torch.randn(BATCH, QUERIES, WIDTH)
    mask = torch.zeros(QUERIES, QUERIES, dtype=torch.bool)
    mask[2] = True
    out, weights = run(ours, query, attn_mask=mask)
    assert not weights[:, 2].any()
    torch.testing.assert_close(out[:, 2], ours.out_proj.bias.expand(BATCH, -1))
    grads = outputs_and_gradients(ours, lambda m, q: run(m, q, attn_mask=mask), {"q": query})
    assert all(grad.isfinite().all() for grad in grads.values())


def test_weights_of_training_are_those_that_made_the_output():
    ours, _ = plain()
    ours.dropout = 0.5
    x = torch.randn(BATCH, QUERIES, WIDTH)
    torch.manual_seed(3)
    out, weights = run(ours, x, average_attn_weights=False)
    assert 0.2 < (weights == 0).double().mean() < 0.8
    value = torch.nn.functional.linear(x, *(t[2 * WIDTH :] for t in (
        ours.in_proj_weight, ours.in_proj_bias
    )))  # fmt: skip
    heads = weights @ value.unflatten(-1, (4, -1)).transpose(1, 2)
    torch.testing.assert_close(ours.out_proj(heads.transpose(1, 2).flatten(2)), out)
    torch.manual_seed(3)
    averaged = run(ours, x)[1]
    torch.testing.assert_close(averaged, weights.mean(1))


def test_eval_draws_nothing_and_training_one_seed():
    ours, _ = plain()
    ours.dropout = 0.5
    x = torch.randn(BATCH, QUERIES, WIDTH)
    ours.eval()
    before = torch.get_rng_state()
    first = run(ours, x)[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(run(ours, x)[0], first)
    ours.train()
    assert not torch.equal(run(ours, x)[0], run(ours, x)[0])


class Cache:
    """The shortest thing that MultiheadAttention takes as a cache."""

    def __init__(self) -> None:
        self.complete = False
        self.key = self.value = None

    def append(self, key: Tensor, value: Tensor) -> tuple:
        if self.key is not None:
            key, value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
        self.key, self.value = key, value
        return key, value, None, True


def turn(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Stands for rotary positions: whatever it does, it does to (B, H, N, D)."""
    assert query.shape[1] == key.shape[1] == 4
    return query.flip(-1), key * 2


@pytest.mark.parametrize("rotary", [None, turn])
@pytest.mark.parametrize("layout", ["batch first", "batch second"])
def test_a_cache_gives_what_the_whole_would(layout, rotary):
    ours, _ = plain(layout=layout)
    dim = 1 if layout == "batch first" else 0
    x = rows({"layout": layout, "dtype": torch.float32}, KEYS, WIDTH)
    whole, _ = run(ours, x, is_causal=True, need_weights=False, rotary=rotary)
    cache = Cache()
    parts = [
        run(ours, part, need_weights=False, rotary=rotary, cache=cache)[0]
        for part in x.split([20, 1, 1, 21], dim)
    ]
    torch.testing.assert_close(torch.cat(parts, dim), whole)


def test_key_lengths_count_where_the_cache_has_none():
    ours, _ = plain()
    x = torch.randn(BATCH, KEYS, WIDTH)
    lengths = torch.tensor([4, KEYS, 1])
    options = {"need_weights": False, "key_lengths": lengths}
    found, _ = run(ours, x, cache=Cache(), **options)
    torch.testing.assert_close(found, run(ours, x, is_causal=True, **options)[0])


def test_a_complete_cache_is_not_projected():
    ours, _ = plain()
    query, memory = torch.randn(BATCH, QUERIES, WIDTH), torch.randn(BATCH, KEYS, WIDTH)
    lengths = torch.tensor([4, KEYS, 1])
    cache = Cache()
    cache.append(*ours._project(query, memory, memory)[1:])
    cache.complete = True
    expected, _ = run(ours, query, memory, need_weights=False, key_lengths=lengths)
    for key in (memory, torch.full_like(memory, torch.nan), None):
        found, _ = ours(query, key, key, need_weights=False, cache=cache, key_lengths=lengths)
        torch.testing.assert_close(found, expected)


# --- Cost -----------------------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    """Which ops ran, and the number of elements of the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("mask", ["none", "padding", "lengths", "both"])
def test_nothing_of_quadratic_size_is_made(mask):
    length, batch, width = 128, 4, 8
    attention = MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
    hidden = torch.arange(length).expand(batch, -1) >= 100
    options = {
        "none": {},
        "padding": {"key_padding_mask": hidden},
        "lengths": {"key_lengths": torch.full((batch,), 100), "is_causal": True},
        # What both masks say differs from element to element, but not from head to head.
        "both": {"key_padding_mask": hidden, "attn_mask": torch.rand(length, length) > 0.5},
    }[mask]
    x = torch.randn(batch, length, width, requires_grad=True)
    with Ops() as ops:
        attention(x, x, x, need_weights=False, **options)[0].sum().backward()
    # The packed projection is the largest; bool masks are a quarter of the floats they count as.
    assert ops.largest <= (batch * length**2 // 4 if mask == "both" else batch * length * width * 3)


def test_no_copy_of_what_is_projected():
    attention = MultiheadAttention(WIDTH, 4, batch_first=True)
    x = torch.randn(BATCH, QUERIES, WIDTH)
    with torch.no_grad(), Ops() as ops:
        attention(x, x, x, need_weights=False)
    assert ops.names.count("addmm") == 2
    assert set(ops.names) & {"clone", "copy_", "cat", "_to_copy"} == set()


def test_weights_are_warned_of_once():
    ours, _ = plain()
    x = torch.randn(BATCH, QUERIES, WIDTH)
    module._warn_of_weights.cache_clear()
    with pytest.warns(UserWarning, match="need_weights=False where they are not used") as seen:
        run(ours, x)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(ours, x)


# --- Errors ---------------------------------------------------------------------------------------

Q, K = torch.randn(2, 5, 32), torch.randn(2, 6, 32)
BOOL = torch.ones(2, 6) > 0
NO_WEIGHTS = {"cache": Cache(), "need_weights": False}


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((Q[..., 1:], K, K), {}, ValueError, r"query must have 3 dim.* width 32; got \(2, 5, 31\)"),
        ((Q, K[0], K), {}, ValueError, r"key must have 3 dimensions, as query, .*; got \(6, 32\)"),
        ((Q, K[:1], K[:1]), {}, ValueError, "key must have the batch size 2 of query in dim"),
        ((Q, K, Q), {}, ValueError, r"value must have the length of key, \(2, 6, 32\); got \(2, 5"),
        ((Q[None], K, K), {}, ValueError, r"query must be \(B, N, E\), .*; got \(1, 2, 5, 32\)"),
        ((Q, None, None), {}, ValueError, "key and value must not be None without a cache"),
        ((Q, Q, Q, BOOL), {}, ValueError, r"key_padding_mask must be \(2, 5\); got \(2, 6\)"),
        ((Q, K, K, BOOL.int()), {}, TypeError, "key_padding_mask must be bool or floating"),
        ((Q[0], K[0], K[0], BOOL), {}, ValueError, r"key_padding_mask must be \(6,\)"),
        ((Q, K, K), {"attn_mask": K}, ValueError, r"attn_mask must be \(5, 6\) or \(8, 5, 6\)"),
        ((Q, K, K), {"attn_mask": BOOL.int()}, TypeError, "attn_mask must be bool or"),
        ((Q, K, K), {"key_lengths": torch.ones(3).int()}, ValueError, r"key_lengths must be \(2"),
        ((Q, K, K), {"cache": Cache()}, ValueError, "with a cache, need_weights must be False"),
        ((Q, K, K), NO_WEIGHTS | {"attn_mask": K}, ValueError, "attn_mask None"),
    ],
)
def test_errors(args, options, error, message):
    with pytest.raises(error, match=message):
        MultiheadAttention(32, 4, batch_first=True)(*args, **options)


def test_nested_tensors_raise():
    nested = torch.nested.nested_tensor([torch.randn(3, 32), torch.randn(5, 32)])
    with pytest.raises(ValueError, match="not nested; got a nested tensor"):
        MultiheadAttention(32, 4, batch_first=True)(nested, nested, nested)
