"""Attention over a sequence that processes share, against the plain formula of the whole."""

import subprocess
import sys
from pathlib import Path

import attention_cases as cases
import pytest
import torch
import torch.distributed as dist
from bounds import assert_within_bound
from torch.distributed.device_mesh import init_device_mesh

from fusedformer.integrations.parallel import (
    gather_sequence,
    ring_attention,
    shard_sequence,
    ulysses_attention,
)
from fusedformer.integrations.sequence import parts
from fusedformer.kernels import rng

ROOT = Path(__file__).resolve().parent.parent
SEED = 1234


def inputs(heads, queries, keys, lengths=None, dim=16):
    """(query, key, value), key lengths, upstream gradient: of the whole sequence, alike in all."""
    torch.manual_seed(0)
    of_query, of_key = heads
    tensors = [torch.randn(2, h, n, dim) for h, n in ((of_query, queries), *[(of_key, keys)] * 2)]
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    return tensors, lengths, torch.randn(2, of_query, queries, dim)


def check_sequence(function, options, group=None):
    """A call over parts of a sequence, forward and backward, gathered, within the bounds."""
    options = dict(options)
    heads, (n, m) = options.pop("heads", (4, 4)), options.pop("sizes", (128, 128))
    tensors, lengths, grad_out = inputs(heads, n, m, options.pop("lengths", None))
    place = {"group": group, "zigzag": options.get("zigzag", False)}
    own = [shard_sequence(t, 2, **place).requires_grad_() for t in tensors]
    torch.manual_seed(dist.get_rank(group))
    out = function(*own, key_lengths=lengths, group=group, **options)
    out.backward(shard_sequence(grad_out, 2, **place))
    found = [gather_sequence(t, 2, **place) for t in (out, *(t.grad for t in own))]
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


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_zigzag_is_equal_work(size):
    """Position i sees i + 1 keys where attention is causal."""
    seen: list[int] = []
    work = set()
    for rank in range(size):
        own = [
            part.start + i for part in parts(8, rank, size, zigzag=True) for i in range(part.length)
        ]
        seen += own
        work.add(sum(position + 1 for position in own))
    assert sorted(seen) == list(range(8 * size))
    assert len(work) == 1


def check_all(function, options):
    for each in options:
        try:
            check_sequence(function, each)
        except Exception as error:
            raise AssertionError(f"with {each}") from error


def check_groups():
    """Two groups of two, each with a sequence of its own."""
    group = init_device_mesh("cpu", (2, 2)).get_group(1)
    for function in (ring_attention, ulysses_attention):
        check_sequence(function, {"causal": True, "dropout_p": 0.3}, group)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_the_example(method):
    """By torchrun on two processes, and on one: the same losses."""
    losses = []
    for count in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        options = [f"--attention={method}", "--length=128", "--steps=2"]
        command = [sys.executable, *launch, "examples/context_parallel.py", *options]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        losses.append([float(line.split()[-1]) for line in run.stdout.splitlines()])
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)  # two units of what is printed


@pytest.mark.slow
def test_a_group_of_some_processes(processes):
    processes.run(4, check_groups)


@pytest.mark.parametrize("function", [ring_attention, ulysses_attention])
def test_one_process_is_attention(alone, function):
    check_sequence(function, {"causal": True, "heads": (4, 2), "dropout_p": 0.3})


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ring_is_attention_of_the_whole(processes, size):
    processes.run(size, check_all, ring_attention, RING)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ulysses_is_attention_of_the_whole(processes, size):
    processes.run(size, check_all, ulysses_attention, ULYSSES)


QKV = [torch.randn(1, 3, 24, 8) for _ in range(3)]


@pytest.mark.parametrize(
    ("function", "tensors", "options", "message"),
    [
        (ring_attention, QKV, {"dropout_p": 0.1}, r"with dropout, .* a multiple of 16; got 24"),
        (
            ring_attention,
            [t[:, :, :16] for t in QKV],
            {"dropout_p": 0.1, "zigzag": True},
            "with dropout and zigzag, the length of query in each process .* 32; got 16",
        ),
        (
            ring_attention,
            [QKV[0], QKV[1][:, :, :23], QKV[2][:, :, :23]],
            {"zigzag": True},
            "with zigzag, the length of key and value .* multiple of 2; got 23",
        ),
        (
            ring_attention,
            [QKV[0], QKV[1][:, :, :8], QKV[2][:, :, :8]],
            {"causal": True},
            "causal needs as many keys as queries; got 8 and 24",
        ),
        (ring_attention, QKV, {"key_lengths": torch.tensor([25])}, "between 0 and .* 24"),
        (
            ulysses_attention,
            [QKV[0], QKV[1][:, :, :8], QKV[2][:, :, :8]],
            {"causal": True},
            "causal needs as many keys as queries; got 8 and 24",
        ),
        (ulysses_attention, [QKV[0], QKV[1][:, :2], QKV[2][:, :2]], {}, "ulysses_.*a multiple of"),
    ],
)
def test_errors(alone, function, tensors, options, message):
    with pytest.raises(ValueError, match=message):
        function(*tensors, **options)


def check_uneven():
    with pytest.raises(ValueError, match=r"heads of query must be a multiple of the 2 .* got 3"):
        ulysses_attention(*QKV)
    with pytest.raises(ValueError, match="dimension 2 must be a multiple of 2 for 2 processes;"):
        shard_sequence(QKV[0][:, :, :23], 2)
    with pytest.raises(ValueError, match=r"multiple of 4 for 2 processes in a zigzag; got 22"):
        shard_sequence(QKV[0][:, :, :22], 2, zigzag=True)


@pytest.mark.slow
def test_what_does_not_divide(processes):
    processes.run(2, check_uneven)
