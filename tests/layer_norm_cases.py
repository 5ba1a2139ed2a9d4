"""What the layer norm tests share: the covering set of cases, their inputs, the plain formula."""

import torch
from pairwise import pairwise
from torch import Tensor
from torch.nn import functional

from fusedformer.kernels import rng

# Widths of one tile with several rows, of one row a tile, and (9000 in the backward, 17000 in
# both directions) of several blocks a row; rows that fill no tile, or more tiles than programs.
SIZES = [(1, 1), (37, 1), (199, 17), (37, 63), (1, 200), (5, 760), (2, 1128), (9, 1500), (2, 9000)]

OPTIONS = {
    "dtype": [torch.float32, torch.float16],
    "size": [*SIZES, (1, 17000)],
    "residual": [None, torch.float32, torch.float16],
    "weight": [None, torch.float32, torch.float16],
    "bias": [None, torch.float32, torch.float16],
    "p": [0.0, 0.1, 0.5],
    "is_rms_norm": [False, True],
    "prenorm": [False, True],
    "residual_in_fp32": [False, True],
    "layout": ["contiguous", "transposed", "every other", "rows apart", "expanded", "two of rows"],
    "grads": ["y", "z", "both", "expanded"],
}

CASES = pairwise(OPTIONS)
SEED = 2**40 + 11


def _tensor(layout: str, rows: int, width: int, **kind) -> Tensor:
    if layout == "transposed":
        return torch.randn(width, rows, **kind).T
    if layout == "every other":
        return torch.randn(rows, 2 * width, **kind)[:, ::2]
    if layout == "rows apart":
        return torch.randn(rows, width + 3, **kind)[:, :width]
    if layout == "expanded":
        return torch.randn(1, width, **kind).expand(rows, width)
    if layout == "two of rows":
        # Two leading dimensions that no single stride covers.
        return torch.randn(rows, 2, width, **kind).transpose(0, 1)
    return torch.randn(rows, width, **kind)


def make_inputs(case: dict) -> tuple[dict, tuple]:
    """(x, residual, weight, bias by name), and the upstream gradients of (y, z)."""
    torch.manual_seed(0)
    (rows, width), layout = case["size"], case["layout"]
    kind = {"dtype": case["dtype"]}
    x = _tensor(layout, rows, width, **kind)
    residual = weight = bias = None
    if case["residual"] is not None:
        residual = _tensor(layout, rows, width, dtype=case["residual"])
    if case["weight"] is not None:
        weight = torch.randn(width, dtype=case["weight"])
    if case["bias"] is not None:
        bias = torch.randn(width, dtype=case["bias"])
    grad_y = _tensor(layout, rows, width, **kind)
    if case["grads"] == "expanded":
        grad_y = torch.randn((), **kind).expand(x.shape)
    grad_z = torch.randn(x.shape, dtype=z_dtype(case))
    return (
        {"x": x, "residual": residual, "weight": weight, "bias": bias},
        (
            torch.zeros_like(x) if case["grads"] == "z" else grad_y,
            grad_z if case["prenorm"] and case["grads"] != "y" else None,
        ),
    )


def eps(case: dict) -> float:
    """Large for one column, whose RMS norm's gradient else cancels to nothing but rounding."""
    return 0.1 if case["size"][1] == 1 else 1e-5


def z_dtype(case: dict) -> torch.dtype:
    """The dtype of z, as documented."""
    if case["residual"] is not None:
        return case["residual"]
    return torch.float32 if case["residual_in_fp32"] else case["dtype"]


def keep_mask(x: Tensor, p: float) -> Tensor:
    """What is kept of x, True = kept."""
    width = x.shape[-1]
    seed = torch.tensor(SEED, device=x.device)
    keep = rng.rows_keep(seed, p, x.numel() // width, width, rng.DROPOUT_ADD_NORM)
    return keep.view(x.shape)


def run_plain(case: dict, tensors: dict, grads: tuple, double: bool) -> dict:
    """The formula in PyTorch and, by autograd, its gradients: in float64, or as a user has it."""
    leaves = {
        name: tensor.detach().to(torch.float64 if double else tensor.dtype).requires_grad_()
        for name, tensor in tensors.items()
        if tensor is not None
    }
    x = leaves["x"]
    z = x
    if case["p"]:
        z = z * keep_mask(x, case["p"]) / (1 - case["p"])
    if "residual" in leaves:
        z = leaves["residual"] + z
    if not double:
        z = z.to(z_dtype(case))
    shape = z.shape[-1:]
    weight, bias = (
        leaves[name].to(z.dtype) if name in leaves else None for name in ("weight", "bias")
    )
    if case["is_rms_norm"]:
        y = functional.rms_norm(z, shape, weight, eps(case))
        y = y if bias is None else y + bias
    else:
        y = functional.layer_norm(z, shape, weight, bias, eps(case))
    y = y.to(x.dtype)
    pairs = [(o, g.to(o.dtype)) for o, g in zip((y, z), grads, strict=True) if g is not None]
    outputs, upstream = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    result = {f"grad_{name}": grad for name, grad in zip(leaves, found, strict=True)}
    return {"y": y, "z": z, **result}
