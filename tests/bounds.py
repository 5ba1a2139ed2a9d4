"""The error bound of every test against float64; no tolerance of theirs is picked by hand."""

import torch
from torch import Tensor


def assert_within_bound(
    name: str, actual: Tensor, eager: Tensor, truth: Tensor, terms: float = 0.0
) -> None:
    """At most twice the error of PyTorch's eager formula, plus 2 ulp of the largest true value.

    Args:
        name: what it is, for the message.
        actual: what is tested.
        eager: the formula in plain PyTorch, in actual's dtype.
        truth: the formula in float64.
        terms: the largest sum of the absolute terms of a value. It stands for the largest true
            value where all of them cancel to zero: a softmax over one key has no gradient.
    """
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, not {truth.shape}"
    if not actual.numel():
        return
    infinite = truth.isinf()
    assert torch.equal(actual.isinf(), infinite), f"{name}: infinities elsewhere than in the truth"
    assert torch.equal(actual[infinite].double(), truth[infinite]), f"{name}: sign of an infinity"
    ulp = torch.finfo(actual.dtype).eps
    actual, eager, truth = (t.detach().double()[~infinite] for t in (actual, eager, truth))
    if not truth.numel():
        return
    error, eager_error = (actual - truth).abs().max(), (eager - truth).abs().max()
    bound = 2 * eager_error + 2 * ulp * (float(truth.abs().max()) or terms)
    # Written so that a NaN fails.
    assert error <= bound, (
        f"{name}: error {error:.3g} over {bound:.3g} (eager's: {eager_error:.3g})"
    )
