"""Dropout and the norms as modules."""

from typing import Any

import torch
from torch import Tensor

from fusedformer.kernels.checks import check_dropout_p, shape
from fusedformer.kernels.dropout import dropout
from fusedformer.kernels.layer_norm import dropout_add_layer_norm, layer_norm, rms_norm


class Dropout(torch.nn.Dropout):
    """``torch.nn.Dropout``, its mask drawn anew in the backward instead of being kept.

    Args:
        p: probability in [0, 1] that an element is dropped, met to 2^-32.
        inplace: must be False: the result is a new tensor.

    Shape:
        any; float32, float16 or bfloat16. The result is contiguous.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        check_dropout_p("Dropout", p, "p")
        if inplace:
            raise ValueError("Dropout: inplace must be False: the result is a new tensor")
        super().__init__(p)

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)


def _as_rows(
    name: str, normalized_shape: "tuple[int, ...]", x: Tensor, *others: "Tensor | None"
) -> "list[Any]":
    """The tensors with the dimensions that are normed together as one, the last."""
    count = len(normalized_shape)
    if tuple(x.shape[-count:]) != tuple(normalized_shape):
        raise ValueError(
            f"{name}: input must end in {tuple(normalized_shape)}, the normalized_shape; "
            f"got {shape(x)}"
        )
    if count == 1:
        return [x, *others]
    return [None if tensor is None else tensor.flatten(-count) for tensor in (x, *others)]


def _like(y: Tensor, x: Tensor) -> Tensor:
    """y in the shape that x had before _as_rows()."""
    return y if y.dim() == x.dim() else y.view(x.shape)


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm``: same arguments, same state_dict.

    Computed in float32 whatever the dtype. The output has the input's dtype, under autocast too
    (where torch's is float32 on some devices), and is contiguous.
    """

    def forward(self, input: Tensor) -> Tensor:
        x, weight, bias = _as_rows(
            "LayerNorm", self.normalized_shape, input, self.weight, self.bias
        )
        return _like(layer_norm(x, weight, bias, self.eps), input)


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm``: same arguments, same state_dict.

    eps None is the machine epsilon of float32 (float64 for float64), in which it is computed. The
    output has the input's dtype, under autocast too, and is contiguous.
    """

    def forward(self, input: Tensor) -> Tensor:
        x, weight = _as_rows("RMSNorm", self.normalized_shape, input, self.weight)
        eps = self.eps
        if eps is None:
            wide = torch.float64 if input.dtype == torch.float64 else torch.float32
            eps = torch.finfo(wide).eps
        return _like(rms_norm(x, weight, eps), input)


class DropoutAddLayerNorm(torch.nn.LayerNorm):
    """Layer norm of residual + dropout(x), one pass: what ends a sublayer of a Transformer.

    The state_dict is that of ``torch.nn.LayerNorm``. In training x is dropped with probability p.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as torch.nn.LayerNorm's.
        p: probability in [0, 1] that an element of x is dropped.
        prenorm: also return z = residual + dropout(x), the residual stream, for a Transformer that
            norms before its sublayers.
    """

    def __init__(
        self,
        normalized_shape: "int | list[int] | tuple[int, ...] | torch.Size",
        p: float = 0.0,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        prenorm: bool = False,
        device: "torch.device | str | None" = None,
        dtype: "torch.dtype | None" = None,
    ) -> None:
        check_dropout_p("DropoutAddLayerNorm", p, "p")
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.p = p
        self.prenorm = prenorm

    # A LayerNorm by its parameters, not by its arguments: hence what is ignored.
    def forward(  # type: ignore[override]
        self, x: Tensor, residual: "Tensor | None" = None
    ) -> "Tensor | tuple[Tensor, Tensor]":
        """y = norm(residual + dropout(x)), or (y, z) with prenorm.

        Args:
            x: (..., *normalized_shape), float32, float16 or bfloat16.
            residual: of x's shape, any of these dtypes, or None.

        Returns:
            y of x's shape and dtype; z of x's shape and residual's dtype (x's without one).
        """
        rows, residual, weight, bias = _as_rows(
            "DropoutAddLayerNorm", self.normalized_shape, x, residual, self.weight, self.bias
        )
        p = self.p if self.training else 0.0
        result: Any = dropout_add_layer_norm(
            rows, residual, weight, bias, p, self.eps, prenorm=self.prenorm
        )
        if self.prenorm:
            return _like(result[0], x), _like(result[1], x)
        return _like(result, x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}, prenorm={self.prenorm}"
