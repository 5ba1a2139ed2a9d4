"""Attention's memory beyond inputs and outputs: linear in the length, with every option on."""

import pytest
import torch
from backends import BACKENDS
from torch.utils._python_dispatch import TorchDispatchMode

from fusedformer import attention
from fusedformer.benchmarks import memory, workers
from fusedformer.kernels import dispatch


def everything(length: int, dtype: torch.dtype, mask: str) -> tuple[list, dict]:
    """(query, key, value, mask), all to get gradients, and the options: no tensor is quadratic."""
    torch.manual_seed(0)
    shapes = [(1, 2, length, 8), (1, 1, length, 8), (1, 1, length, 8)]
    shapes.append((1, 1, 1, length) if mask == "keys" else (1, 2, length, 1))
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    lengths = torch.tensor([length - 3], dtype=torch.int32)
    return tensors, {"key_lengths": lengths, "causal": True, "dropout_p": 0.1, "seed": 1}


def forward_and_backward(tensors: list, options: dict, backend: str) -> None:
    *inputs, mask = tensors
    out, lse = attention(*inputs, mask=mask, **options, return_lse=True, backend=backend)
    torch.autograd.grad((out.sum(), lse[..., 7:].sum()), tensors)


def _peak(length: int, dtype: torch.dtype, mask: str) -> int:
    torch.set_num_threads(2)  # each keeps scratch memory of its own
    forward_and_backward(*everything(64, dtype, mask), "cpu")  # what is loaded on first use
    tensors, options = everything(length, dtype, mask)
    meter = memory.PeakMeter("cpu")
    forward_and_backward(tensors, options, "cpu")
    return meter.extra()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="there is no C++ library here, or a GPU")
@pytest.mark.parametrize(
    ("dtype", "mask"),
    [
        (torch.float32, "keys"),
        pytest.param(torch.bfloat16, "queries", marks=pytest.mark.slow),
    ],
)
def test_on_a_cpu(dtype, mask):
    """What a fresh process takes: not even a bit for each score, of which there are 2^27."""
    length = 2**13
    with workers.Workers(fresh=True) as pool:
        outcome = pool.run(_peak, length, dtype, mask)
    assert outcome.status == workers.OK, outcome.reason
    if outcome.value is None:
        pytest.skip("this system does not tell")
    assert outcome.value < 2 * length**2 / 8


class Made(TorchDispatchMode):
    """Counts the bytes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.bytes += storage.nbytes() * (storage.data_ptr() not in known)
        return result


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("mask", ["keys", pytest.param("queries", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_what_launchers_make(backend, mask):
    """Twice the length, twice the bytes; the reference, which writes weights down, fails this."""
    pytest.importorskip("triton")
    module = dispatch.load(backend, "attention")
    made = []
    for length in (32, 64):
        (query, key, value, extra), options = everything(length, torch.float32, mask)
        seed = torch.tensor(1)
        args = (query, key, value, extra, options["key_lengths"], seed, 0, 0.3, 0.1, [0, 0, 0, 0])
        with torch.no_grad(), Made() as counted:
            out, lse = module.attention_fwd(*args)
            module.attention_bwd(out, lse, out, lse, *args, True)
        made.append(counted.bytes)
    linear = made[1] <= 2 * made[0]
    assert linear == (backend != "reference"), made
