"""What the tests of modules share: one of ours beside its twin from torch.nn."""

import copy
import math
from collections.abc import Callable

import torch
from bounds import assert_within_bound
from torch import Tensor, nn


def twins(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Both with the same random parameters, in dtype; strict about names, both ways."""
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn(parameter.shape) * max(parameter.shape) ** -0.5)
    ours = ours.to(dtype)
    theirs = theirs.to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def outputs_and_gradients(
    module: nn.Module, call: Callable, inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """By name: outputs, gradients of the inputs that are floating, gradients of the parameters."""
    leaves = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    module.zero_grad(set_to_none=True)
    results = call(module, **leaves)
    results = [results] if isinstance(results, Tensor) else [r for r in results if r is not None]
    generator = torch.Generator(results[0].device).manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for result in results:
        upstream = torch.randn(result.shape, generator=generator, dtype=torch.float64)
        total = total + (result * upstream.to(result.dtype)).double().sum()
    total.backward()
    found = {f"output {i}": result.detach() for i, result in enumerate(results)}
    found |= {f"gradient of {k}": v.grad for k, v in leaves.items() if v.grad is not None}
    found |= {
        f"gradient of {k}": p.grad for k, p in module.named_parameters() if p.grad is not None
    }
    return found


def assert_agree(
    ours: nn.Module,
    theirs: nn.Module,
    call: Callable,
    inputs: dict[str, Tensor],
    terms: float = 0.0,
) -> None:
    """Outputs and all gradients by tests/bounds.py, the twin in float64 being the truth.

    The outputs, and the gradients, are taken as one tensor each, every part of which is scaled by
    a power of two to be at most 1: an error made in one layer goes through all those below, so that
    what eager's happens to be in one small tensor says little.
    """
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    truth = outputs_and_gradients(copy.deepcopy(theirs).double(), call, wide)
    eager = outputs_and_gradients(theirs, call, inputs)
    actual = outputs_and_gradients(ours, call, inputs)
    assert_all_within_bound(actual, eager, truth, terms)


def assert_all_within_bound(
    actual: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor], terms: float
) -> None:
    """What assert_agree() says, of results of outputs_and_gradients()."""
    assert actual.keys() == eager.keys() == truth.keys()
    for kind in ("output", "gradient"):
        parts: list[list[Tensor]] = [[], [], []]
        errors = {}
        for name in (name for name in truth if name.startswith(kind)):
            assert actual[name].dtype == eager[name].dtype, name
            assert actual[name].shape == truth[name].shape, name
            unit = 2.0 ** math.ceil(math.log2(float(truth[name].abs().max()) or terms))
            for part, found in zip(parts, (actual, eager, truth), strict=True):
                part.append(found[name].flatten() / unit)
            errors[name] = float((parts[0][-1] - parts[2][-1]).abs().max())
        if errors:
            label = f"{kind}s (worst: {max(errors, key=errors.__getitem__)})"
            assert_within_bound(label, *(torch.cat(part) for part in parts))
