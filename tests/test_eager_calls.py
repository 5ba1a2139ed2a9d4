"""What an eager call may leave out, and that nothing which looks on is left out with it."""

import contextlib
from typing import ClassVar

import pytest
import torch
from mode_cases import CASES, results
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fusedformer
from fusedformer.kernels import dispatch

OPS = sorted(dispatch.OPS)
every = pytest.mark.parametrize("name", OPS)
shape = (2, 4, 16, 8)


def make(name):
    torch.manual_seed(0)
    module, inputs = CASES[name]
    return module(), inputs(2, 5)


def without_gradients(name):
    module, inputs = make(name)
    return module.requires_grad_(False)(*inputs)


def ours(op) -> "str | None":
    """The name of an op that is one of ours."""
    return op._schema.name.partition("::")[2] if op in REGISTERED else None


REGISTERED = [
    getattr(torch.ops.fusedformer, name).default
    for op in OPS
    for name in (f"{op}_fwd", f"{op}_bwd", f"{op}_scaled")
    if hasattr(torch.ops.fusedformer, name)
]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(ours(func))
        return func(*args, **kwargs or {})


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(ours(func))
        return func(*args, **kwargs or {})


class Wrapped(torch.Tensor):
    """A tensor that knows what was done to it, and needs no mode for that."""

    names: ClassVar[list] = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.names.append(ours(func))
        return func(*(x.inner if isinstance(x, cls) else x for x in args), **kwargs or {})


@contextlib.contextmanager
def vmapped():
    """As inside torch.vmap, whose tensors are of no class of their own."""
    level = torch._C._functorch._vmap_increment_nesting(2, "error")
    try:
        yield level
    finally:
        torch._C._functorch._vmap_decrement_nesting()


@every
@pytest.mark.parametrize("mode", [Seen, SeenFunctions])
def test_a_mode_sees_the_op(name, mode):
    with mode() as seen:
        without_gradients(name)
    assert f"{name}_fwd" in seen.names


@every
def test_a_mode_sees_the_op_and_its_backward_with_gradients(name):
    with Seen() as seen:
        results(*make(name))
    assert {f"{name}_fwd", f"{name}_bwd"} <= set(seen.names)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_subclass_sees_the_op(place):
    tensors = [torch.randn(shape) for _ in range(3)]
    wanted = fusedformer.attention(*tensors)
    tensors[place] = Wrapped(tensors[place])
    Wrapped.names = []
    assert torch.equal(fusedformer.attention(*tensors), wanted)
    assert "attention_fwd" in Wrapped.names


@every
def test_fake_tensors_in_their_mode_and_past_it(name):
    module, inputs = make(name)
    wanted = results(module, inputs)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x) for x in inputs]
    with mode:
        within = results(module, fakes)
    for fake, real in zip(within, wanted, strict=True):
        assert type(fake) is FakeTensor
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    past = module.requires_grad_(False)(*fakes)
    assert {type(x) for x in (past if isinstance(past, tuple) else (past,))} == {FakeTensor}


@pytest.mark.filterwarnings("ignore")
def test_a_trace_holds_the_op():
    x = torch.randn(shape)
    traced = torch.jit.trace(lambda x: fusedformer.attention(x, x, x), x, check_trace=False)
    assert "fusedformer::attention_fwd" in str(traced.graph)


def test_lazy_negatives_are_what_they_stand_for():
    lazy = [torch.complex(torch.zeros(shape), torch.randn(shape)).conj().imag for _ in range(3)]
    assert all(x.is_neg() for x in lazy)
    for backend in ("cpu", "reference"):
        if fusedformer.available_backends()[backend] is None:
            found = fusedformer.attention(*lazy, backend=backend)
            real = fusedformer.attention(*(x.resolve_neg() for x in lazy), backend=backend)
            assert torch.equal(found, real)


@pytest.mark.parametrize(
    "around",
    [Seen, SeenFunctions, FakeTensorMode, lambda: torch.device("cpu"), vmapped],
    ids=["dispatch mode", "function mode", "fake tensors", "default device", "vmap"],
)
def test_the_short_way_is_for_calls_that_nothing_sees(around):
    args = (torch.ones(1), torch.nn.Parameter(torch.ones(1)), None, 1, 0.5, True, [0], "")
    assert dispatch.unobserved(args)
    with torch.no_grad(), torch.inference_mode(), torch.autocast("cpu"):
        assert dispatch.unobserved(args)
    with around():
        assert not dispatch.unobserved(args)
    assert dispatch.unobserved(args)
    assert not dispatch.unobserved((torch.ones(1, device="meta"), *args))
    assert not dispatch.unobserved((*args, Wrapped(torch.ones(1))))


def test_on_a_gpu_only_tensors_that_are_their_memory_take_the_short_way(monkeypatch):
    lazy = torch.complex(torch.zeros(shape), torch.randn(shape)).conj().imag
    zeros = torch._efficientzerotensor(shape)
    on_cpu = ((lazy, 1), (torch.ones(1), None, zeros))
    assert all(map(dispatch.unobserved, on_cpu))
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    assert not dispatch.unobserved((torch.ones(1),))  # on neither
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert dispatch.unobserved((torch.ones(1), torch.nn.Parameter(torch.ones(1)), None, 0.5, [0]))
    assert not any(map(dispatch.unobserved, on_cpu))
    with Seen():
        assert not dispatch.unobserved((torch.ones(1),))


@every
def test_a_profile_shows_the_op_and_its_backward(name):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        results(*make(name))
    seen = {event.name for event in profile.events()}
    assert {f"fusedformer::{name}_fwd", f"fusedformer::{name}_bwd"} <= seen


@pytest.mark.parametrize("way", [contextlib.nullcontext, Seen], ids=["short", "long"])
def test_a_bad_call_after_a_good_one_raises(way):
    query, key = torch.randn(shape), torch.randn(shape)
    lengths = torch.tensor([3, 16])
    with way():
        fusedformer.attention(query, key, key, key_lengths=lengths)
        lengths[1] = 17
        with pytest.raises(ValueError, match="values from 3 to 17"):
            fusedformer.attention(query, key, key, key_lengths=lengths)
        with pytest.raises(TypeError, match="value must have the dtype of query"):
            fusedformer.attention(query, key, key.half())
        with pytest.raises(ValueError, match="dropout_p must be from 0 to 1"):
            fusedformer.attention(query, key, key, dropout_p=2)
        with pytest.raises(RuntimeError, match="float64 runs on the reference backend only"):
            fusedformer.attention(query.double(), key.double(), key.double(), backend="cpu")


@every
def test_batched_gradients_are_those_one_by_one(name):
    """autograd hands the backward a batch that looks like one tensor (is_grads_batched)."""
    module, args = make(name)
    floating = [x.requires_grad_() for x in args if x.is_floating_point()]
    inputs = [*floating, *module.parameters()]
    out = module(*args)
    out = out[0] if isinstance(out, tuple) else out
    batch = torch.randn(3, *out.shape)
    found = torch.autograd.grad(out, inputs, batch, is_grads_batched=True, retain_graph=True)
    for n, grad_out in enumerate(batch):
        single = torch.autograd.grad(out, inputs, grad_out, retain_graph=True)
        for one, other in zip(found, single, strict=True):
            assert torch.equal(one[n], other)


@every
def test_both_ways_compute_the_same(name):
    short = results(*make(name))
    with Seen():
        long = results(*make(name))
    for one, other in zip(short, long, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
