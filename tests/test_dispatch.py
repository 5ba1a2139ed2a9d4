"""Which backend runs: one that is named runs or raises, the automatic choice falls through."""

import types
import warnings

import pytest
import torch

import fusedformer
from fusedformer import attention, available_backends, use_backend
from fusedformer.kernels import dispatch


def _inputs(*shape, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype) for _ in range(3)]


def test_an_explicit_backend_runs_or_raises(monkeypatch):
    tensors = _inputs(1, 1, 4, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"attention: backend 'triton' cannot run: .*float64"):
        attention(*tensors, backend="triton")
    with use_backend("triton"), pytest.raises(RuntimeError, match="cannot run"):
        attention(*tensors)
    with pytest.raises(ValueError, match="use_backend: backend must be one of"), use_backend("x"):
        pass
    attention(*tensors)  # the block has ended


def test_use_backend_is_left_by_an_exception():
    with pytest.raises(KeyError), use_backend("triton"):
        raise KeyError
    assert dispatch._default == ""


def test_available_backends():
    found = available_backends("attention", "cpu")
    assert found["reference"] is None
    for name in ("layer_norm", "rms_norm", "scaled_dot_product_attention"):
        assert available_backends(name, "cpu")["reference"] is None
    with pytest.raises(ValueError, match="op must be one of"):
        available_backends("convolution")


def test_a_failed_import_is_kept_and_shown(monkeypatch):
    monkeypatch.setitem(dispatch.BACKENDS, "triton", "fusedformer.kernels.no_such_module")
    monkeypatch.setattr(dispatch, "_modules", {})
    monkeypatch.setattr(dispatch, "_failures", {})
    monkeypatch.setattr(dispatch, "_questions", {})
    tensors = _inputs(1, 1, 4, 4)
    with pytest.raises(RuntimeError, match=r"cannot be imported \(ModuleNotFoundError"):
        attention(*tensors, backend="triton")
    assert "no_such_module" in dispatch.failure("triton", "attention")


def test_landing_on_the_reference_off_the_cpu_warns_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    tensor = torch.empty(1, device="meta")  # stands for a device without kernels
    monkeypatch.setattr(
        dispatch, "load", lambda backend, op: types.SimpleNamespace(
            attention_unsupported=lambda *args: None
        ),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="attention runs on the slow reference backend on meta"):
        dispatch.pick("attention", "", (tensor,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.pick("attention", "", (tensor,))


# --- Tensors without strides ----------------------------------------------------------------------

X, ROW, CLASSES = torch.ones(4, 8), torch.ones(8), torch.tensor([0, 1, 2, 3])
HEADS = torch.ones(2, 2, 4, 8)
CALLS = {
    "attention: key": lambda bad: fusedformer.attention(HEADS, bad(HEADS), HEADS),
    "attention: mask": lambda bad: fusedformer.attention(
        HEADS, HEADS, HEADS, mask=bad(torch.ones(4, 4))
    ),
    "attention: key_lengths": lambda bad: fusedformer.attention(
        HEADS, HEADS, HEADS, key_lengths=bad(CLASSES[:2])
    ),
    "layer_norm: x": lambda bad: fusedformer.layer_norm(bad(X), ROW),
    "rms_norm: weight": lambda bad: fusedformer.rms_norm(X, bad(ROW)),
    "dropout_add_layer_norm: x": lambda bad: fusedformer.dropout_add_layer_norm(bad(X), X, ROW),
    "dropout_add_layer_norm: residual": lambda bad: fusedformer.dropout_add_layer_norm(X, bad(X)),
    "dropout: x": lambda bad: fusedformer.dropout(bad(X)),
    "bias_activation: bias": lambda bad: fusedformer.bias_activation(X, bad(ROW)),
    "cross_entropy: target": lambda bad: fusedformer.cross_entropy(X, bad(CLASSES)),
    "linear_cross_entropy: input": lambda bad: fusedformer.linear_cross_entropy(bad(X), X, CLASSES),
}


@pytest.mark.parametrize("name", CALLS)
def test_sparse_tensors_raise(name):
    with pytest.raises(TypeError, match=f"^{name} must be a dense tensor, .*torch.sparse_coo"):
        CALLS[name](torch.Tensor.to_sparse)
    CALLS[name](lambda x: x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_raise():
    nested = torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged)
    for name, op in (("rms_norm", fusedformer.rms_norm), ("dropout", fusedformer.dropout)):
        with pytest.raises(TypeError, match=f"^{name}: x must be a dense tensor, .* a nested"):
            op(nested)


# Of the class Tensor and with the layout strided, but without a shape.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", CALLS)
def test_nested_tensors_of_the_older_layout_raise(name):
    argument = name.partition(": ")[2]
    with pytest.raises(TypeError, match=f": {argument} must be a dense tensor, .* a nested"):
        CALLS[name](lambda x: torch.nested.nested_tensor([x, x]))
    nested = torch.nested.nested_tensor([HEADS[0], HEADS[0]])
    for op in (fusedformer.attention, fusedformer.scaled_dot_product_attention):
        with pytest.raises(TypeError, match=f"^{op.__name__}: query must be a dense tensor"):
            op(nested, nested, nested)
