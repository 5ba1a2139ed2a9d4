"""Attention over a sequence that processes share, against the plain formula of the whole."""

import attention_cases as cases
import pytest
import torch
import torch.distributed as dist
from bounds import assert_within_bound
from processes import Processes

from fusedformer.integrations.parallel import (
    gather_sequence,
    ring_attention,
    shard_sequence,
    ulysses_attention,
)
from fusedformer.kernels import rng

SEED = 1234


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    pool = Processes(4, tmp_path_factory.mktemp("processes"))
    yield pool
    pool.close()


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def inputs(heads, queries, keys, lengths=None, dim=16):
    """(query, key, value), key lengths, upstream gradient: of the whole sequence, alike in all."""
    torch.manual_seed(0)
    of_query, of_key = heads
    tensors = [torch.randn(2, h, n, dim) for h, n in ((of_query, queries), *[(of_key, keys)] * 2)]
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    return tensors, lengths, torch.randn(2, of_query, queries, dim)


def check_sequence(function, options):
    """A call over parts of a sequence, forward and backward, gathered, within the bounds."""
    options = dict(options)
    heads, (n, m) = options.pop("heads", (4, 4)), options.pop("sizes", (128, 128))
    tensors, lengths, grad_out = inputs(heads, n, m, options.pop("lengths", None))
    zigzag = options.get("zigzag", False)
    own = [shard_sequence(t, 2, zigzag=zigzag).requires_grad_() for t in tensors]
    torch.manual_seed(dist.get_rank())
    out = function(*own, key_lengths=lengths, **options)
    out.backward(shard_sequence(grad_out, 2, zigzag=zigzag))
    parts = [out, *(t.grad for t in own)]
    found = [gather_sequence(t, 2, zigzag=zigzag) for t in parts]
    p = options.get("dropout_p", 0.0)
    if p and "seed" not in options:
        torch.manual_seed(0)  # as the first process did
        options["seed"] = int(rng.draw_seed(torch.device("cpu")))
    plain = {name: options.get(name) for name in ("causal", "scale", "seed")}
    plain |= {"mask": None, "key_lengths": lengths, "dropout_p": p, "offsets": None}
    grads = (grad_out, None)
    truth = cases.run_plain(tensors, plain, grads, torch.float64)
    eager = cases.run_plain(tensors, plain, grads, torch.float32)
    saved = cases.run_saved_lse(tensors, plain, grads, torch.randperm(tensors[0].shape[3]))
    names = ("out", "grad_query", "grad_key", "grad_value")
    for name, actual in zip(names, found, strict=True):
        error = (eager[name] - truth[name]).abs().max()
        other = saved.get(name, eager[name])
        other = other if (other - truth[name]).abs().max() > error else eager[name]
        assert_within_bound(name, actual, other, truth[name])


RING = [
    {},
    {"causal": True},
    {"causal": True, "zigzag": True},
    {"zigzag": True, "scale": 0.5, "heads": (3, 1)},
    {"causal": True, "heads": (4, 2), "dropout_p": 0.3, "seed": SEED},
    {"causal": True, "zigzag": True, "dropout_p": 0.3},
    {"dropout_p": 0.5, "heads": (2, 1), "sizes": (64, 128), "lengths": (128, 7)},
    {"causal": True, "lengths": (0, 70), "backend": "reference"},
    {"causal": True, "zigzag": True, "lengths": (33, 128), "dropout_p": 0.25},
]
ULYSSES = [
    {},
    {"causal": True, "heads": (8, 4), "dropout_p": 0.3, "seed": SEED},
    {"dropout_p": 0.3, "sizes": (12, 20), "lengths": (3, 20), "scale": 0.5},
]


def check_all(function, options):
    for each in options:
        try:
            check_sequence(function, each)
        except Exception as error:
            raise AssertionError(f"with {each}") from error


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ring_is_attention_of_the_whole(processes, size):
    processes.run(size, check_all, ring_attention, RING)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ulysses_is_attention_of_the_whole(processes, size):
    processes.run(size, check_all, ulysses_attention, ULYSSES)
