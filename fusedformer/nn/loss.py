"""Cross-entropy as modules: of logits, and of a linear layer that is part of the loss."""

import torch
from torch import Tensor

from fusedformer.kernels.checks import check_floating, shape
from fusedformer.kernels.cross_entropy import cross_entropy
from fusedformer.kernels.linear_cross_entropy import linear_cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` of class indices: same arguments, same state_dict.

    Logits are (V,), (N, V) or (N, V, d1, ...), the latter at the price of a copy; where the classes
    come last, flatten: ``loss(logits.flatten(0, -2), target.flatten())``. A target that is neither
    ignore_index nor a class raises on a CPU, and gives NaN on a GPU. Class probabilities as target
    raise TypeError.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        check_floating("CrossEntropyLoss", "input", input)
        if target.is_floating_point():
            raise TypeError(
                "CrossEntropyLoss: target must be class indices (class probabilities are not "
                f"supported, torch.nn.CrossEntropyLoss takes them); got {target.dtype}"
            )
        logits, flat = input, target
        if input.dim() > 2:
            if target.shape != input.shape[:1] + input.shape[2:]:
                raise ValueError(
                    f"CrossEntropyLoss: target must be {tuple(input.shape[:1] + input.shape[2:])} "
                    f"for an input of {shape(input)}, whose dimension 1 has the classes; "
                    f"got {shape(target)}"
                )
            logits, flat = input.movedim(1, -1).flatten(0, -2), target.flatten()
        loss = cross_entropy(
            logits, flat, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip
        return loss.view(target.shape) if self.reduction == "none" else loss


class LinearCrossEntropyLoss(torch.nn.Module):
    """The cross-entropy of a linear layer's logits, which are made in chunks and never kept.

    The arguments and the state_dict (``linear.weight``, ``linear.bias``, ``weight``) are those of
    torch 2.13's ``torch.nn.LinearCrossEntropyLoss`` without out_features and options. To tie the
    layer to an embedding: ``loss.linear.weight = embedding.weight``.

    Args:
        in_features: H, the width of the input.
        num_classes: V.
        bias: learn a bias of the logits.
        device, dtype: of the linear layer.
        reduction: "mean", "sum" or "none".
        weight: (V,), of each class.
        ignore_index: a target that contributes nothing; None is -100.
        label_smoothing: from 0 to 1.

    Shape:
        input (..., H), target (...) of class indices; a scalar, or (...) if reduction is "none".
    """

    weight: "Tensor | None"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: "torch.device | str | None" = None,
        dtype: "torch.dtype | None" = None,
        reduction: str = "mean",
        weight: "Tensor | None" = None,
        ignore_index: "int | None" = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.linear = torch.nn.Linear(in_features, num_classes, bias, device, dtype)
        self.num_classes = num_classes
        self.reduction = reduction
        self.ignore_index = -100 if ignore_index is None else ignore_index
        self.label_smoothing = label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(
            input, self.linear.weight, target, linear_bias=self.linear.bias, weight=self.weight,
            ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )
