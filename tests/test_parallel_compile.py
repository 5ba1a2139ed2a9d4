"""Attention over a shared sequence in compiled code: one graph, and what eager code gives."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import fusedformer
from fusedformer.integrations.parallel import ring_attention, shard_sequence, ulysses_attention

OPTIONS = {"causal": True, "dropout_p": 0.3}
CASES = [
    (ring_attention, OPTIONS | {"zigzag": True, "seed": 3}),
    (ring_attention, OPTIONS),  # the first process's seed
    (ulysses_attention, OPTIONS),
]


def inputs(length):
    torch.manual_seed(0)
    tensors = [torch.randn(2, heads, length, 16) for heads in (4, 2, 2)]
    own = [shard_sequence(t, 2).requires_grad_() for t in tensors]
    return own, torch.tensor([length, length // 2], dtype=torch.int32)


def results(call, own, lengths):
    torch.manual_seed(dist.get_rank())
    out = call(*own, key_lengths=lengths)
    upstream = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, *torch.autograd.grad(out, own, upstream)]


def check_compiled(group=None):
    for function, options in CASES:
        call = functools.partial(function, group=group, **options)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
        counts = set()
        for length in (64, 192):
            given = inputs(length)
            for found, wanted in zip(results(compiled, *given), results(call, *given), strict=True):
                assert torch.equal(found, wanted), (function, options)
            counts.add(counter.frame_count)
        assert len(counts) == 1
        torch.compiler.reset()


def check_inductor_and_groups():
    check_compiled(dist.new_group([0, 1]))
    call = functools.partial(ring_attention, seed=3, **OPTIONS)
    given = inputs(64)
    found = results(torch.compile(call, fullgraph=True), *given)
    for one, wanted in zip(found, results(call, *given), strict=True):
        torch.testing.assert_close(one, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_compiled, check_inductor_and_groups])
def test_one_graph_on_two_processes(processes, check):
    processes.run(2, check)


def test_modes_of_a_ring_of_one(alone):
    """As every op's: shapes on the meta device, counted, no forward mode."""
    own, lengths = inputs(64)
    meta = [t.detach().to("meta") for t in own]
    out = ring_attention(*meta)
    assert (out.shape, out.device.type) == (own[0].shape, "meta")
    with pytest.raises(NotImplementedError, match="fusedformer has no forward-mode"):
        torch.func.jvp(lambda q: ring_attention(q, *own[1:]), (own[0],), (own[0],))
    counts = []
    for function in (ring_attention, fusedformer.attention):
        with FlopCounterMode(display=False) as counter:
            function(*own, causal=True, key_lengths=lengths).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
