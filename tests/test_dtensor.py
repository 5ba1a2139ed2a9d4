"""Ops on DTensors against the same ops on the whole tensors, on meshes of two and four devices."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fusedformer
from fusedformer.kernels import rng

WHOLE = [Replicate()]
HEADS = [Shard(1)]
ROWS = [Shard(0)]


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def results(function, mesh, tensors, placements):
    """Whole outputs and gradients of function(*tensors), each tensor placed as said (None: not)."""
    given = [
        t.clone() if place is None else distribute_tensor(t, mesh, place)
        for t, place in zip(tensors, placements, strict=True)
    ]
    # A plain tensor beside DTensors is the whole of it, and gets no gradient.
    sharded = isinstance(given[0], DTensor)
    trained = [t for t in given if t.is_floating_point() and isinstance(t, DTensor) == sharded]
    for t in trained:
        t.requires_grad_()
    outputs = function(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(isinstance(out, DTensor) == sharded for out in outputs)
    outputs = [whole(out) for out in outputs]
    upstream = [torch.linspace(-1, 1, out.numel()).view(out.shape) for out in outputs]
    grads = torch.autograd.grad(outputs, trained, upstream)
    return [*outputs, *map(whole, grads)]


def compare(function, mesh, tensors, placements, exact=True):
    """Asserts that placing the tensors changes nothing; unless exact, but the order of sums."""
    plain = results(function, mesh, tensors, [None] * len(tensors))
    sharded = results(function, mesh, tensors, placements)
    for one, other in zip(plain, sharded, strict=False):
        if exact:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(other, one)


def heads(key_heads=4):
    """(query, key, value)"""
    torch.manual_seed(0)
    return [torch.randn(4, n, 40, 16) for n in (8, key_heads, key_heads)]


def compare_attention(mesh, query, key=None, value=None, key_heads=4, more=(), **options):
    names = [name for name, *_ in more]

    def call(query, key, value, *others):
        given = dict(zip(names, others, strict=True))
        return fusedformer.attention(query, key, value, return_lse=True, **given, **options)

    tensors = [*heads(key_heads), *(tensor for _, tensor, _ in more)]
    placements = [query, key or query, value or query, *(place for *_, place in more)]
    compare(call, mesh, tensors, placements, exact=key_heads > 1)


def check_attention():
    mesh = init_device_mesh("cpu", (2,))
    dropout = {"dropout_p": 0.3, "seed": 5}
    compare_attention(mesh, HEADS, causal=True, **dropout)
    compare_attention(mesh, ROWS, **dropout)
    compare_attention(mesh, WHOLE, **dropout)
    compare_attention(mesh, HEADS, WHOLE, ROWS, **dropout)  # these follow query
    compare_attention(mesh, HEADS, key_heads=1, **dropout)  # that every query head reads
    lengths = torch.tensor([40, 3, 0, 17])
    mask = torch.randn(1, 8, 1, 40)
    compare_attention(
        mesh, HEADS, more=[("key_lengths", lengths, None), ("mask", mask, WHOLE)], **dropout
    )
    compare_attention(
        mesh, ROWS, more=[("key_lengths", lengths, ROWS), ("mask", mask > 0, None)], **dropout
    )
    check_a_common_seed(mesh)


def check_a_common_seed(mesh):
    """Without a seed, that of the first process."""
    tensors = heads()
    torch.manual_seed(torch.distributed.get_rank())
    given = [distribute_tensor(t, mesh, HEADS) for t in tensors]
    out = fusedformer.attention(*given, dropout_p=0.5).full_tensor()
    torch.manual_seed(0)
    seed = rng.draw_seed(torch.device("cpu"))
    assert torch.equal(out, fusedformer.attention(*tensors, dropout_p=0.5, seed=seed))


def check_rows():
    mesh = init_device_mesh("cpu", (2,))
    x, residual, weight, bias = (torch.randn(4, 6, 24), torch.randn(4, 6, 24), *torch.randn(2, 24))

    def add_norm(x, residual, weight, bias, p=0.0):
        return fusedformer.dropout_add_layer_norm(
            x, residual, weight, bias, p, prenorm=True, seed=3
        )

    def add_norm_dropped(*tensors):
        return add_norm(*tensors, 0.3)

    vectors = [weight, bias]
    for rows in (ROWS, [Shard(1)]):
        placements = [rows, rows, WHOLE, WHOLE]
        compare(add_norm, mesh, [x, residual, *vectors], placements, exact=False)
    compare(add_norm_dropped, mesh, [x, residual, *vectors], [WHOLE] * 4)
    compare(fusedformer.layer_norm, mesh, [x, *vectors], [ROWS, WHOLE, WHOLE], exact=False)
    compare(fusedformer.rms_norm, mesh, [x, weight], [[Shard(1)], WHOLE], exact=False)
    for place, of_bias in ((ROWS, WHOLE), ([Shard(2)], ROWS), (WHOLE, WHOLE)):
        compare(fusedformer.bias_activation, mesh, [x, bias], [place, of_bias], exact=False)
    targets = torch.randint(24, (4, 6))
    for reduction in ("mean", "sum", "none"):

        def loss(x, t, reduction=reduction):
            return fusedformer.cross_entropy(x, t, reduction=reduction)

        compare(loss, mesh, [x, targets], [[Shard(1)], None], exact=False)

    def linear_loss(x, w, t):
        return fusedformer.linear_cross_entropy(x, w, t, reduction="none")

    classes = torch.randn(50, 24)
    compare(linear_loss, mesh, [x, classes, targets], [ROWS, WHOLE, ROWS], exact=False)
    check_dropout_of_shards(mesh)


def check_dropout_of_shards(mesh):
    """Shards draw unlike masks, replicas one; the backward draws them again."""
    x = distribute_tensor(torch.ones(4, 64), mesh, ROWS).requires_grad_()
    y = fusedformer.dropout(x, 0.5, seed=1)
    (grad,) = torch.autograd.grad(y.full_tensor().sum(), x)
    assert torch.equal(grad.full_tensor(), y.full_tensor())
    first, second = y.full_tensor().chunk(2)
    assert torch.equal(first, fusedformer.dropout(torch.ones(2, 64), 0.5, seed=1))
    assert not torch.equal(first, second)
    torch.manual_seed(torch.distributed.get_rank())
    replicated = distribute_tensor(torch.ones(4, 64), mesh, WHOLE)
    mine = fusedformer.dropout(replicated, 0.5).to_local()
    assert torch.equal(mine, distribute_tensor(mine, mesh, WHOLE).to_local())


def check_two_dimensions():
    mesh = init_device_mesh("cpu", (2, 2))
    dropout = {"dropout_p": 0.3, "seed": 5}
    compare_attention(mesh, [Shard(0), Shard(1)], causal=True, **dropout)
    compare_attention(mesh, [Shard(1), Shard(1)], causal=True, **dropout)
    compare_attention(mesh, [Replicate(), Shard(1)], [Shard(1), Replicate()], **dropout)
    check_errors(mesh)


def check_errors(mesh):
    both = [Shard(0), Shard(1)]
    query, key, value = (distribute_tensor(t, mesh, both) for t in heads())
    sequence = distribute_tensor(heads()[0], mesh, [Shard(0), Shard(2)])
    with pytest.raises(ValueError, match=r"placed as .* ring_attention and ulysses_attention"):
        fusedformer.attention(sequence, sequence, sequence)
    with pytest.raises(ValueError, match="sharded over 4 devices, so its size must be a multiple"):
        fusedformer.attention(
            query.redistribute(placements=[Shard(1), Shard(1)]), *[key[:, :2], value[:, :2]]
        )
    learned = torch.zeros(40, requires_grad=True)
    with pytest.raises(ValueError, match="that requires a gradient must be one; got a plain"):
        fusedformer.attention(query, key, value, mask=learned)
    other = init_device_mesh("cpu", (4,))
    elsewhere = distribute_tensor(heads()[1], other, [Shard(0)])
    with pytest.raises(ValueError, match="all DTensors must be on the mesh of query"):
        fusedformer.attention(query, elsewhere, value)
    logits = distribute_tensor(torch.randn(4, 8), mesh, both)
    with pytest.raises(ValueError, match="shard any dimension but the classes"):
        fusedformer.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    # What each device has a summand of is summed up first.
    summands = DTensor.from_local(torch.ones(4, 8), mesh, [Partial(), Partial()])
    found, wanted = map(fusedformer.bias_activation, (summands, torch.full((4, 8), 4.0)))
    assert torch.equal(found.full_tensor(), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "check"), [(2, check_attention), (2, check_rows), (4, check_two_dimensions)]
)
def test_a_mesh_changes_nothing(processes, size, check):
    processes.run(size, check)
