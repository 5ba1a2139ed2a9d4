"""What a call of any op does on a GPU besides its kernels: it waits for nothing, allocates what is
stated and no more, is captured in a CUDA graph, runs on a device that is not the current one.

On a machine without a GPU the launchers run on tensors without data, and launches are recorded.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedformer as ff

pytest.importorskip("triton")
from fusedformer.kernels.triton import activation, attention, cross_entropy, dropout, launch
from fusedformer.kernels.triton import layer_norm as norm

BF16, FP32 = torch.bfloat16, torch.float32

# --- Whole calls, on a GPU ------------------------------------------------------------------------

ROWS, WIDTH, CLASSES = 70, 200, 1000


def norms(x, residual, weight, bias, *, seed):
    options = {"dropout_p": 0.5, "prenorm": True, "seed": seed}
    return torch.cat(ff.dropout_add_layer_norm(x, residual, weight, bias, **options))


def of_targets(function):
    def call(*tensors, seed):
        target = torch.arange(tensors[0].shape[0], device=tensors[0].device)
        return function(*tensors, target)

    return call


# Shapes of the tensors that have gradients, and the call; "plain" draws nothing.
QKV = [(2, 4, 130, 64), *[(2, 2, 130, 64)] * 2]
CALLS = {
    "attention": (QKV, lambda q, k, v, seed: ff.attention(q, k, v, dropout_p=0.5, seed=seed)),
    "attention, plain": (QKV, lambda q, k, v, seed: ff.attention(q, k, v, causal=True)),
    "attention, a bias": (
        [*QKV, (1, 4, 130, 130)],
        lambda q, k, v, bias, seed: ff.attention(q, k, v, mask=bias, dropout_p=0.5, seed=seed),
    ),
    "dropout_add_layer_norm": ([(ROWS, WIDTH)] * 2 + [(WIDTH,)] * 2, norms),
    "rms_norm, plain": ([(ROWS, WIDTH), (WIDTH,)], lambda x, w, seed: ff.rms_norm(x, w)),
    "dropout": ([(ROWS, WIDTH)], lambda x, seed: ff.dropout(x, 0.5, seed=seed)),
    "bias_activation": (
        [(ROWS, WIDTH), (WIDTH,)],
        lambda x, b, seed: ff.bias_activation(x, b, "gelu", 0.5, seed=seed),
    ),
    "cross_entropy, plain": ([(ROWS, CLASSES)], of_targets(ff.cross_entropy)),
    "cross_entropy of many, plain": ([(ROWS, 9 * CLASSES)], of_targets(ff.cross_entropy)),
    "linear_cross_entropy, plain": (
        [(ROWS, WIDTH), (CLASSES, WIDTH)], of_targets(ff.linear_cross_entropy),
    ),
}  # fmt: skip


def tensors_of(name, device="cuda"):
    generator = torch.Generator(device).manual_seed(0)
    shapes, _ = CALLS[name]
    return [
        torch.randn(shape, device=device, generator=generator, requires_grad=True)
        for shape in shapes
    ]


def run(name, tensors, seed=None):
    """Output and gradients; the upstream gradient is the output's cosine."""
    out = CALLS[name][1](*tensors, seed=seed)
    return [out, *torch.autograd.grad(out, tensors, out.detach().cos())]


def test_calls_cover_every_op():
    """On the device that there is; and that seeds decide where they should."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in CALLS:
        tensors = tensors_of(name, device)
        seeds = (torch.tensor(n, device=device) for n in (1, 1, 2))
        first, again, other = (run(name, tensors, seed)[0] for seed in seeds)
        assert torch.equal(first, again), name
        assert torch.equal(first, other) == name.endswith("plain"), name
    ops = {name.partition(",")[0].partition(" ")[0] for name in CALLS}
    assert ops | {"layer_norm"} == set(launched_ops())


def launched_ops():
    from fusedformer.kernels import dispatch

    return {dispatch.PART_OF.get(op, op) for op in dispatch.OPS} | {"rms_norm", "layer_norm"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_gpu(name):
    tensors = tensors_of(name)
    run(name, tensors)  # what is compiled or loaded on first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(name, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_a_graph_of_forward_and_backward(name):
    """Each replay works on what its inputs hold then, with a seed of its own."""
    tensors = tensors_of(name)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(name, tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed = torch.randint(2**62, (), device="cuda")
        found = run(name, tensors, seed)
    seeds = []
    for _ in range(3):
        with torch.no_grad():
            for tensor in tensors:
                tensor.mul_(0.9)
        graph.replay()
        seeds.append(seed.item())
        for replayed, wanted in zip(found, run(name, tensors, seed.clone()), strict=True):
            torch.testing.assert_close(replayed, wanted)
    assert len(set(seeds)) == 3


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", CALLS)
def test_a_gpu_that_is_not_the_current_one(name):
    here = tensors_of(name)
    there = [tensor.detach().to("cuda:1").requires_grad_() for tensor in here]
    found = run(name, there, torch.tensor(3, device="cuda:1"))
    for one, other in zip(found, run(name, here, torch.tensor(3, device="cuda")), strict=True):
        torch.testing.assert_close(one.to("cuda:0"), other)


# --- Launchers, without data ----------------------------------------------------------------------


class Allocated(TorchDispatchMode):
    """Bytes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.bytes += out.nbytes
        return out


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


SEED = meta(dtype=torch.int64)
CHIP = launch.Chip(90, 132)


def attention_calls():
    """A projection's layout, causal, with dropout; the backward has a float32 for each query."""
    q, k, v, grad = (meta(2, 500, 8, 64).transpose(1, 2) for _ in range(4))
    args = (q, k, v, None, None, SEED, 0, 0.125, 0.1, [0, 0, 0, 0])
    out, lse = attention.attention_fwd(*args)
    yield lambda: attention.attention_fwd(*args), 0
    backward = (grad, lse.clone(), out, lse, *args, False)
    yield lambda: attention.attention_bwd(*backward), lse.nbytes


def norm_calls():
    """The backward has a float32 row of sums a program for each of the two weights."""
    for rows, width in ((4096, 1024), (100, 768), (64, 32768)):
        x, grad = meta(rows, width), meta(rows, width)
        weight = meta(width, dtype=FP32)
        args = (weight, weight, SEED)
        forward = (x, x, *args, 0.1, 0.0, False, False, BF16)
        _, _, mean, rstd = norm.dropout_add_layer_norm_fwd(*forward)
        yield lambda forward=forward: norm.dropout_add_layer_norm_fwd(*forward), 0
        backward = (grad, None, x, x, *args, mean, rstd, 0.1, False, False, BF16, True, True, True)
        config = norm.backward_config(width, True, 6)
        programs = norm.backward_programs(rows, config, torch.device("cuda", 0))
        assert programs <= 132 * max(6, 6144 // width)
        yield (
            lambda backward=backward: norm.dropout_add_layer_norm_bwd(*backward),
            2 * programs * width * 4,
        )


def other_calls():
    """Bias and activation: four rows of sums a multiprocessor; the rest has nothing."""
    x, bias = meta(4096, 1024), meta(1024)
    args = (x, bias, SEED, "gelu", 0.1)
    yield lambda: activation.bias_activation_fwd(*args), 0
    sums = 132 * 4 * 256 * 4  # tiles of 256 columns, which a program keeps to
    yield lambda: activation.bias_activation_bwd(x, *args, True), sums + 1024 * 4  # added up
    yield lambda: dropout.dropout_fwd(x, SEED, 0.1), 0
    for classes in (1000, 50257):
        logits, target = meta(64, classes), meta(64, dtype=torch.int64)
        args = (target, None, -100, 0.0)
        grad, lse = meta(64, dtype=FP32), meta(64, dtype=FP32)
        yield lambda logits=logits, args=args: cross_entropy.cross_entropy_fwd(logits, *args), 0
        given = (grad, lse, logits, *args)
        yield lambda given=given: cross_entropy.cross_entropy_bwd(*given), 0


@pytest.mark.parametrize("calls", [attention_calls, norm_calls, other_calls])
def test_workspace_is_what_is_stated(calls):
    """Beside outputs; and no value is read, as these tensors have none."""
    with launch.recording(CHIP):
        for call, workspace in calls():
            with Allocated() as allocated:
                out = call()
            outputs = out if isinstance(out, tuple) else (out,)
            returned = sum(tensor.nbytes for tensor in outputs if tensor is not None)
            assert allocated.bytes - returned == workspace, calls.__doc__
