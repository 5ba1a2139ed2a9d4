"""linear_cross_entropy's memory: never the whole logits, chunks within their budget."""

import pytest
import torch
from backends import ONE_BACKEND
from torch.utils._python_dispatch import TorchDispatchMode

from fusedformer.kernels import linear_cross_entropy as module
from fusedformer.kernels.linear_cross_entropy import linear_cross_entropy

OPS = torch.ops.fusedformer
CHUNK = 16


IMPLEMENTATIONS = {
    OPS.linear_cross_entropy_fwd.default: module._fwd,
    OPS.linear_cross_entropy_bwd.default: module._bwd,
    OPS.linear_cross_entropy_scaled.default: module._scaled,
}


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that is made, inside our ops too."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in IMPLEMENTATIONS:
            with self:
                return IMPLEMENTATIONS[func](*args)
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("backend", ONE_BACKEND)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_never_the_whole_logits(backend, reduction, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_TOKENS", CHUNK)
    tokens, hidden, classes = 10 * CHUNK, 8, 1000
    x = torch.randn(tokens, hidden, requires_grad=True)
    linear_weight = torch.randn(classes, hidden, requires_grad=True)
    target = torch.randint(0, classes, (tokens,))
    with LargestTensor() as largest:
        loss = linear_cross_entropy(x, linear_weight, target, reduction=reduction, backend=backend)
        loss.sum().backward()
    # A chunk's rows are padded to 128 bytes.
    assert largest.elements <= CHUNK * (classes + 63)


def test_chunks_are_bounded_and_even():
    assert module.chunk_tokens(32768, 131072, 2) == 2048
    assert module.chunk_tokens(2049, 1000, 2) == 1025
    assert module.chunk_tokens(3, 1000, 2) == 3
    for classes, itemsize in ((262144, 4), (10**6, 2)):
        length = module.chunk_tokens(32768, classes, itemsize)
        assert length * classes * itemsize <= module.CHUNK_BYTES
    assert module.chunk_tokens(5, 2**40, 4) == 1


@pytest.mark.gpu
def test_peak_memory_gpu():
    tokens, hidden, classes = 16384, 1024, 65536
    kind = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.randn(tokens, hidden, **kind, requires_grad=True)
    linear_weight = torch.randn(classes, hidden, **kind).div_(32).requires_grad_()
    target = torch.randint(0, classes, (tokens,), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(x, linear_weight, target).backward()
    extra = torch.cuda.max_memory_allocated() - before
    grads = 2 * (x.numel() + linear_weight.numel())
    # A chunk of logits and the weight's gradient in float32, with a little for small tensors.
    assert extra <= grads + 2048 * classes * 2 + 4 * linear_weight.numel() + 2**26
