"""What the tests of both cross-entropies share: the plain formula, and targets."""

import torch
from torch import Tensor

IGNORED = -7


def targets(rows: int, classes: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Class indices, both ends among them, every third one IGNORED."""
    target = torch.randint(0, classes, (rows,), dtype=dtype, device=device)
    target[0], target[rows // 2] = classes - 1, 0
    target[2::3] = IGNORED
    return target


def plain_losses(x: Tensor, target: Tensor, weight: "Tensor | None", smoothing: float) -> Tensor:
    """Each row's loss by PyTorch's own functions, in the dtype of x.

    By logsumexp: its rounding, which the gradient shows where logits are large, is that of every
    implementation that keeps LSE.
    """
    weight = torch.ones_like(x[0]) if weight is None else weight.to(x.dtype)
    ignored = target == IGNORED
    index = target.masked_fill(ignored, 0).long()
    surprise = x.logsumexp(-1, keepdim=True) - x
    losses = (1 - smoothing) * weight[index] * surprise.gather(1, index[:, None])[:, 0]
    if smoothing:
        losses = losses + smoothing / x.shape[1] * (weight * surprise).sum(1)
    return losses.masked_fill(ignored, 0)
