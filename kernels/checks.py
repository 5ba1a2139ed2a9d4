"""Argument checks that every op shares; each error names the op, the argument, got and wanted."""

import math
import numbers
from typing import TypeGuard

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def shape(tensor: Tensor) -> str:
    """The shape as errors print it."""
    return str(tuple(tensor.shape))


def check_strided(op: str, name: str, tensor: object) -> None:
    """Raises TypeError unless it is a tensor, and neither sparse nor nested nor MKL-DNN's own."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor; got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout is not torch.strided:
        got = "a nested tensor" if tensor.is_nested else f"the layout {tensor.layout}"
        raise TypeError(f"{op}: {name} must be a dense tensor, with strides; got {got}")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raises TypeError unless it is a tensor of one of DTYPES.

    That a plain one is not sparse is asked when its call has failed: dispatch.register().
    """
    if type(tensor) not in PLAIN_TENSORS or tensor.is_nested:
        check_strided(op, name, tensor)
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be float32, float16, bfloat16 or float64; got {tensor.dtype}"
        )


def alike(first: Tensor, *others: Tensor) -> bool:
    """Whether all are plain tensors of one device and of one of DTYPES: what is usual, at a glance.

    False says no more than that each has to be looked at, by check_floating() and check_tensor().
    """
    if type(first) not in PLAIN_TENSORS or first.dtype not in DTYPES or first.is_nested:
        return False
    dtype, device = first.dtype, first.device
    for other in others:
        if type(other) not in PLAIN_TENSORS or other.dtype != dtype or other.device != device:
            return False
        if other.is_nested:
            return False
    return True


def check_tensor(
    op: str, name: str, tensor: Tensor, *, like: Tensor, like_label: str, same_dtype: bool = True
) -> None:
    """Raises unless it is a tensor on the device (and, if asked, of the dtype) of another.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another device.
    """
    if type(tensor) not in PLAIN_TENSORS or tensor.is_nested:
        check_strided(op, name, tensor)
    if same_dtype and tensor.dtype != like.dtype:
        raise TypeError(
            f"{op}: {name} must have the dtype of {like_label}, {like.dtype}; got {tensor.dtype}"
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {like_label}, {like.device}; "
            f"got {tensor.device}"
        )


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number, Python's or numpy's; a bool is none."""
    return isinstance(value, (float, int, numbers.Real)) and not isinstance(value, bool)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an integer, Python's or numpy's; a bool is none."""
    return isinstance(value, (int, numbers.Integral)) and not isinstance(value, bool)


def check_dropout_p(op: str, p: object, name: str = "dropout_p") -> None:
    """Raises unless p, an argument called ``name``, is a number in [0, 1].

    Raises:
        TypeError: not a number.
        ValueError: below 0, above 1 or NaN.
    """
    if type(p) is not float and not is_number(p):
        raise TypeError(f"{op}: {name} must be a number from 0 to 1; got {p!r}")
    if not 0 <= p <= 1:
        raise ValueError(f"{op}: {name} must be from 0 to 1; got {p}")


def checked_scale(op: str, scale: object) -> float:
    """The scale of the scores as a float.

    Raises:
        TypeError: not a number.
        ValueError: NaN or infinite.
    """
    if not is_number(scale) and not isinstance(scale, torch.SymFloat):
        raise TypeError(f"{op}: scale must be a number; got {scale!r}")
    value = float(scale)
    if not -math.inf < value < math.inf:  # math.isfinite takes no symbols
        raise ValueError(f"{op}: scale must be finite; got {value}")
    return value


def device_type(tensor: Tensor) -> str:
    """``tensor.device.type``, without making a device where the tensor is on the CPU."""
    return "cpu" if tensor.is_cpu else tensor.device.type


def autocast_is_on(device: str) -> bool:
    """Whether autocast is on for a type of device; there are some that it does not know."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(op: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on, as torch's matmul-like ops do.

    Like torch's, it leaves float64 alone.
    """
    device = device_type(tensors[0]) if isinstance(tensors[0], Tensor) else "cpu"
    if not autocast_is_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    narrow = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in narrow else t for t in tensors)
