"""The C++ kernels of the ops on rows: each instruction set, any number of threads."""

import layer_norm_cases
import pytest
import test_activation
import test_cross_entropy
import test_dropout
import test_layer_norm
import torch
from backends import ROW_BACKENDS

import fusedformer
from fusedformer.kernels import native, native_build, rng

pytestmark = [
    pytest.mark.skipif("cpu" not in ROW_BACKENDS, reason="there is no C++ library here, or a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]
PAIR = ("reference", "cpu")


def in_bfloat16(case: dict) -> dict:
    """Triton's interpreter does not have it, so that only these tests compare it on a CPU."""
    return {k: torch.bfloat16 if v is torch.float16 else v for k, v in case.items()}


def _some(cases: list, step: int) -> list:
    return [pytest.param(cases[n::step], id=f"{n} of {step}") for n in range(step)]


def _fast_and_slow(cases: list, step: int = 8) -> list:
    first, *rest = _some(cases, step)
    return [first, *(pytest.param(*p.values, id=p.id, marks=pytest.mark.slow) for p in rest)]


@pytest.mark.parametrize("cases", _fast_and_slow(layer_norm_cases.CASES))
def test_layer_norm_pairs(isa, cases):
    for case in cases:
        test_layer_norm.check_pairs(case, PAIR)
        test_layer_norm.check_pairs(in_bfloat16(case), PAIR)


@pytest.mark.parametrize("cases", _fast_and_slow(test_activation.CASES))
def test_activation_pairs(isa, cases):
    for case in cases:
        test_activation.check_pairs(case, backends=PAIR)
        test_activation.check_pairs(in_bfloat16(case), backends=PAIR)


@pytest.mark.parametrize("cases", _fast_and_slow(test_cross_entropy.CASES))
def test_cross_entropy_pairs(isa, cases):
    for case in cases:
        test_cross_entropy.check_pairs(case, backends=PAIR)
        test_cross_entropy.check_pairs(in_bfloat16(case), backends=PAIR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 2**-33, 0.3, 1 - 2**-30])
def test_dropout_pairs(isa, dtype, p):
    for shape in test_dropout.SHAPES if p == 0.3 else [(9, 300)]:
        if p > 0:
            test_dropout.check_pairs(shape, dtype, p, PAIR)
        x = torch.ones(shape, dtype=dtype)
        seed, width = torch.tensor(-(2**40) - 7), x.shape[-1] if x.dim() else 1
        keep = rng.rows_keep(seed, p, x.numel() // width, width, rng.DROPOUT).view(shape)
        assert torch.equal(native.dropout_fwd(x, seed, p) != 0, keep)


def test_every_16_bit_number(isa):
    """Conversions, NaN and infinities and subnormal numbers included: x + 0 is x."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)
        y = fusedformer.bias_activation(x.view(16, -1), None, "relu", backend="cpu").view(-1)
        expected = x.relu()
        if isa == "avx512bf16" and dtype == torch.bfloat16:
            # vcvtneps2bf16 takes subnormal numbers for 0.
            expected = torch.where(expected.float().abs() < 2**-126, 0, expected)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(3.0), expected.nan_to_num(3.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding(isa, dtype):
    """Of float32 to 16 bits: to nearest, ties to even, as PyTorch."""
    near = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    near = near[near.isfinite()].view(torch.int32)
    places = 16 if dtype == torch.bfloat16 else 13
    x = torch.cat(
        [near + (step << places - 2) + off for step in range(4) for off in (-1, 0, 1)]
    ).view(torch.float32)
    x = x[x.isfinite() & (x.abs() >= 2**-126)]
    # z is residual rounded, where x is nothing.
    _, z = fusedformer.dropout_add_layer_norm(
        torch.zeros(x.numel(), 1).to(dtype), x[:, None].to(dtype), prenorm=True, backend="cpu"
    )
    assert torch.equal(z[:, 0], x.to(dtype))
    y = fusedformer.dropout_add_layer_norm(
        x[:, None], torch.zeros(x.numel(), 1, dtype=dtype), prenorm=True, backend="cpu"
    )[1]
    assert torch.equal(y[:, 0], x.to(dtype))


def _results() -> list:
    """What every op gives, forward and backward, of sizes that make many tasks."""
    torch.manual_seed(0)
    x, residual, grad = torch.randn(3, 700, 333).unbind()
    x, residual = x.requires_grad_(), residual.requires_grad_()
    weight, bias = torch.randn(2, 333).unbind()
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    target = torch.randint(333, (700,))
    options = {"dropout_p": 0.2, "seed": 4, "backend": "cpu"}
    outs = [
        fusedformer.dropout_add_layer_norm(x, residual, weight, bias, **options),
        fusedformer.bias_activation(x, bias, "gelu", **options),
        fusedformer.dropout(x, 0.2, seed=4, backend="cpu"),
        fusedformer.cross_entropy(x, target, reduction="none", backend="cpu")[:, None],
    ]
    return outs + [
        g
        for out in outs
        for g in torch.autograd.grad(
            out, (x, residual, weight, bias), grad[:, : out.shape[1]], allow_unused=True
        )
        if g is not None
    ]


def test_any_number_of_threads_gives_the_same_bits(isa):
    threads = torch.get_num_threads()
    found = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(_results())
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_large_outputs_are_stored_past_the_caches(isa):
    """From 32 MB on, by other instructions; their results are the same."""
    torch.manual_seed(0)
    x, residual = torch.randn(2, 4096, 2048).unbind()
    options = {"dropout_p": 0.1, "seed": 4, "backend": "cpu"}
    whole = fusedformer.dropout_add_layer_norm(x, residual, prenorm=True, **options)
    part = fusedformer.dropout_add_layer_norm(x[:99], residual[:99], prenorm=True, **options)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[:99], b)
        assert a.isfinite().all()


def test_the_choice_of_instruction_set():
    ops = torch.ops.fusedformer_native
    names = ops.isas().split()
    assert names == ["portable", "avx2", "avx512", "avx512bf16"][: len(names)]
    assert ops.isa() == names[-1]
    with pytest.raises(RuntimeError, match="this CPU has no sse9"):
        ops.set_isa("sse9")
    assert ops.set_isa("portable") == names[-1]
    assert ops.set_isa("") == "portable"
    about = native.about()
    assert about["instruction_set"] == names[-1]
    assert native_build.find_compiler().isas.keys() >= {"portable"}


def test_small_rows_and_many(isa):
    """Calls of several rows share a vector of random numbers, and one row's end may lie in it."""
    seed = torch.tensor(3)
    for width in (1, 15, 16, 17, 40, 100, 130, 250):
        x = torch.ones(37, width)
        keep = rng.rows_keep(seed, 0.5, 37, width, rng.DROPOUT)
        assert torch.equal(native.dropout_fwd(x, seed, 0.5) != 0, keep), width
