"""Attention over a shared sequence in compiled code, one graph; ops on DTensors, several."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.flop_counter import FlopCounterMode

import fusedformer
from fusedformer.integrations.parallel import (
    ring_attention,
    shard_sequence,
    tensor_parallel_plan,
    ulysses_attention,
)

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
def check_dtensors():
    """Ops on DTensors run between graphs."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    torch.manual_seed(0)
    x = distribute_tensor(torch.randn(2, 4, 32, 16), mesh, [Shard(1)]).requires_grad_()

    def attend(x):
        return fusedformer.attention(x, x, x, seed=3, **OPTIONS)

    layer = fusedformer.nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
    layer = parallelize_module(layer, mesh, tensor_parallel_plan(layer))
    for call, given in ((attend, x), (layer, torch.randn(2, 8, 32, requires_grad=True))):
        runs = []
        for function in (torch.compile(call, backend="aot_eager"), call):
            out = function(given)
            runs.append([out, *torch.autograd.grad(out.sum(), given)])
        for found, wanted in zip(*runs, strict=True):
            found, wanted = (t.full_tensor() if call is attend else t for t in (found, wanted))
            assert torch.equal(found, wanted)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="ops on DTensors run between"):
        torch.compile(attend, fullgraph=True, backend="aot_eager")(x)


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


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_compiled, check_inductor_and_groups, check_dtensors])
def test_on_two_processes(processes, check):
    processes.run(2, check)
