"""Checks of the kernels on a device: masks bit for bit, drop rates, odd shapes for a sanitizer.

    compute-sanitizer python -m fusedformer.benchmarks.gpu_checks

runs every op (no model), forward and backward, on shapes that end within a tile; it compares
nothing.
"""

import math

import torch

import fusedformer
from fusedformer.benchmarks.ops import attention, common, cross_entropy, rows
from fusedformer.benchmarks.ops.registry import OPS
from fusedformer.kernels import dispatch, rng

PROBABILITIES = (0.001, 0.01, 0.1, 0.25, 0.5, 0.9)

# (rows, columns) of the rows' masks; (batch, heads, length) of attention's: its keys are at most
# the largest head dimension, so that a value matrix of ones and zeros shows every decision.
_SIZES = {"cuda": ((4096, 4096), (32, 16, 256)), "cpu": ((256, 1000), (2, 2, 128))}


def dropout(device: str) -> list[dict]:
    """Drop rates and masks of dropout and attention at each of PROBABILITIES.

    Returns:
        For each op and p: "elements", "dropped" (the share), "deviation" of it from p in standard
        deviations of a fair draw, and "differing", elements where the mask is not that of the
        random-number contract written in plain PyTorch. Fair masks deviate by more than 4 once in
        16 thousand draws.
    """
    found = []
    asked = [("dropout", "", _row_masks)]
    asked += [("attention", name, _attention_masks) for name in _backends(device)]
    for seed, p in enumerate(PROBABILITIES):
        for op, backend, masks in asked:
            kept, wanted = masks(device, p, seed, backend or None)
            count = kept.numel()
            dropped = count - int(kept.sum())
            spread = math.sqrt(count * p * (1 - p))
            found.append(
                {
                    "op": op,
                    "backend": backend,
                    "p": p,
                    "elements": count,
                    "dropped": dropped / count,
                    "deviation": (dropped - count * p) / spread,
                    "differing": int((kept != wanted).sum()),
                }
            )
    return found


def _backends(device: str) -> list[str]:
    """Attention's: "" is the automatic choice; others that can run here are forced."""
    if device == "cpu":
        return [""]
    able = dispatch.available_backends("attention", device)
    return ["", *(name for name in ("cuda",) if able.get(name, "absent") is None)]


def _row_masks(
    device: str, p: float, seed: int, backend: "str | None"
) -> "tuple[torch.Tensor, torch.Tensor]":
    shape = _SIZES[device][0]
    out = fusedformer.dropout(torch.ones(shape, device=device), p, seed=seed, backend=backend)
    at = rng.as_seed("dropout", seed, out.device)
    return out.ne(0), rng.rows_keep(at, p, *shape, rng.DROPOUT)


def _attention_masks(
    device: str, p: float, seed: int, backend: "str | None"
) -> "tuple[torch.Tensor, torch.Tensor]":
    batch, heads, length = _SIZES[device][1]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    flat = torch.zeros(batch, heads, length, length, dtype=dtype, device=device)  # all alike
    one_hot = torch.eye(length, dtype=dtype, device=device).repeat(batch, heads, 1, 1)
    case = attention.Case(batch, heads, length, length, dropout_p=p, device=device)
    out = attention.seeded(case, seed, backend)(flat, flat, one_hot)
    at = rng.as_seed("attention", seed, out.device)
    return out.ne(0), rng.attention_keep(at, p, flat.shape)


def odd_shapes(device: str) -> int:
    """Runs every op on shapes that end within a tile, in each dtype; how many calls ran."""
    cases: dict[type, list] = {
        attention.Case: [
            attention.Case(2, 4, 67, 40, "bf16", True, 0.1, device, 2, True),
            attention.Case(1, 2, 130, 64, "bf16", False, 0.0, device),
            attention.Case(1, 3, 33, 24, "fp32", True, 0.5, device),
            # Other tiles of the CUDA kernels, and more than one of them.
            attention.Case(1, 2, 200, 128, "bf16", True, 0.1, device),
            attention.Case(1, 2, 140, 256, "fp16", False, 0.1, device, 1, True),
        ],
        rows.Case: [
            rows.Case(37, 760, "bf16", 0.1, device),
            rows.Case(3, 1, "fp32", 0.5, device),
            rows.Case(129, 5000, "fp16", 0.1, device),
        ],
        cross_entropy.Case: [
            cross_entropy.Case(33, 1003, 24, "bf16", device),
            cross_entropy.Case(5, 70001, 16, "fp32", device),
        ],
    }
    done = 0
    for op in OPS.values():
        for case in cases.get(op.case, ()):  # no models
            backends = _backends(device) if op is attention.OP and case.dtype != "fp32" else [""]
            for backend in backends:
                seed = 1 if case.dropout_p else None
                function = op.seeded(case, seed, backend or None)
                # The CUDA kernels have a backward of their own for it, whose blocks take turns.
                for deterministic in (False, True) if backend == "cuda" else (False,):
                    held = op.inputs(case, 0)
                    torch.use_deterministic_algorithms(deterministic)
                    common.backward_of(held)(function(*held.args))
                    torch.use_deterministic_algorithms(False)
                    done += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return done


if __name__ == "__main__":
    print(odd_shapes("cuda" if torch.cuda.is_available() else "cpu"), "calls")
