"""Times the variants of the CUDA forward beside the tiles that its library has.

    python -m fusedformer.benchmarks.tune_cuda [--seconds 240] [--out tune_cuda.json]

For a Hopper GPU with nvcc. Every variant is first compared with the reference, on calls that end
within a tile; one that is wrong, or that hangs, is not timed. The rest take turns with the present
tile, from a cold L2 cache. The file, written anew after each case, has {"environment", "rows"}; a
row is

    {"op": "attention_fwd", "variant": name, "default": name of what it is compared with, "case":
     {"batch", "heads", "length", "dim", "causal", "p"}, "correct": bool, "reason": why it was not
     timed, or null, "ms", "default_ms": medians, or null, "speedup": default_ms / ms, or null}
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fusedformer
from fusedformer.benchmarks import cuda_variants, environment, timing, workers
from fusedformer.benchmarks.gpu import INTERRUPTED, terminated_as_interrupted
from fusedformer.kernels.cuda.library import unsupported_gpu
from fusedformer.kernels.native_cache import BuildError

PRESENT = "present"  # the tile that the library of the kernels has

# What a training step of 16 thousand tokens and 2048 channels has, as FlashAttention-3's tables.
LENGTH, BATCH, CHANNELS = 8192, 2, 2048
DROPOUT = 0.1

# A kernel that hangs is ended after this; the first call of a process also loads the library.
_CHECK_SECONDS = 30.0


def check(index: int) -> None:
    """Compares a variant with the reference in float64, on small calls of every kind.

    Raises:
        AssertionError: it is wrong; the text says where.
    """
    variant = cuda_variants.variants()[index]
    generator = torch.Generator("cuda").manual_seed(0)
    for causal in (False, True):
        for p in (0.0, 0.3):
            if not variant.takes(p):
                continue
            shapes = [(2, heads, n, variant.dim) for heads, n in ((4, 300), (2, 700), (2, 700))]
            tensors = [torch.randn(s, device="cuda", generator=generator) for s in shapes]
            query, key, value = (t.bfloat16() for t in tensors)
            lengths = torch.tensor([700, 333], dtype=torch.int32, device="cuda")
            seed = torch.tensor(7, device="cuda")
            options: dict[str, Any] = {"causal": causal, "key_lengths": lengths}
            options |= {"dropout_p": p, "seed": seed}
            found = []
            for dtype in (torch.float64, torch.bfloat16):
                inputs = (t.to(dtype) for t in (query, key, value))
                out = fusedformer.attention(*inputs, **options, backend="reference")
                assert isinstance(out, torch.Tensor)  # there is no LSE beside it
                found.append(out.double())
            truth, eager = found
            for tensor in (key, value):
                tensor[1, :, 333:] = torch.nan
            out, _ = cuda_variants.forward(
                variant, query, key, value, key_lengths=lengths, dropout_p=p,
                seed=seed if p else None, diagonal=700 - 300 if causal else None,
            )  # fmt: skip
            error = (out.double() - truth).abs().max().item()
            ulp = torch.finfo(torch.bfloat16).eps * truth.abs().max().item()
            allowed = 2 * (eager - truth).abs().max().item() + 2 * ulp
            what = f"causal={causal}, p={p}: an error of {error:.3g}; {allowed:.3g} is allowed"
            assert error <= allowed, what


def measure(indices: list[int], causal: bool, p: float, seconds: float) -> dict[int, float]:
    """Milliseconds of variants of one head dimension, medians, interleaved."""
    every = cuda_variants.variants()
    dim = every[indices[0]].dim
    shape = (BATCH, CHANNELS // dim, LENGTH, dim)
    query, key, value = torch.randn(3, *shape, device="cuda").bfloat16()
    seed = torch.tensor(1, device="cuda") if p else None
    options: dict[str, Any] = {"dropout_p": p, "seed": seed, "diagonal": 0 if causal else None}

    def call(index: int) -> timing.Sample:
        return timing.whole(
            [lambda: cuda_variants.forward(every[index], query, key, value, **options)]
        )

    samples = {str(index): call(index) for index in indices}
    found = timing.time_interleaved(
        samples, timing.clock_for("cuda"), seconds=seconds, min_rounds=5, max_rounds=40, warmup=3
    )
    for result in found.values():
        if "error" in result:
            raise result["error"]
    return {int(name): timing.quantile(result["ms"], 0.5) for name, result in found.items()}


def run(seconds: float) -> Iterator[list[dict]]:
    """Checks and times all variants within about so many seconds; yields the rows of each case."""
    every = cuda_variants.variants()  # builds the library, which the time is not counted for
    end = time.perf_counter() + seconds
    dims = sorted({variant.dim for variant in every})
    dims.sort(key=lambda dim: dim not in (64, 128))  # what matters most first
    cases = list(itertools.product(dims, (True, False), (0.0, DROPOUT)))
    reasons: dict[int, str | None] = {}
    with workers.Workers(fresh=False) as worker:
        for number, (dim, causal, p) in enumerate(cases):
            for variant in every:
                if variant.dim == dim and variant.index not in reasons:
                    left = max(1.0, min(_CHECK_SECONDS, end - time.perf_counter()))
                    outcome = worker.run(check, variant.index, timeout=left)
                    reasons[variant.index] = outcome.reason or None
            asked = [v for v in every if v.dim == dim and (v.takes(p) or not v.name)]
            timed = [v.index for v in asked if reasons[v.index] is None and v.takes(p)]
            share = (end - time.perf_counter()) / (len(cases) - number)
            outcome = workers.Outcome(workers.TOO_SLOW, reason="no time was left")
            if share > 0 and timed:
                outcome = worker.run(measure, timed, causal, p, share / 2, timeout=share + 30)
            yield _rows(asked, outcome, reasons, dim, causal, p)


def _rows(
    asked: list[cuda_variants.Variant],
    outcome: workers.Outcome,
    reasons: "dict[int, str | None]",
    dim: int,
    causal: bool,
    p: float,
) -> list[dict]:
    found = outcome.value if outcome.status == workers.OK else {}
    default = next((found.get(v.index) for v in asked if not v.name), None)
    case = {"batch": BATCH, "heads": CHANNELS // dim, "length": LENGTH, "dim": dim}
    rows = []
    for variant in asked:
        ms = found.get(variant.index)
        rows.append(
            {
                "op": "attention_fwd",
                "variant": variant.name or PRESENT,
                "default": PRESENT,
                "case": case | {"causal": causal, "p": p},
                "correct": reasons[variant.index] is None,
                "reason": reasons[variant.index] or outcome.reason or None,
                "ms": ms,
                "default_ms": default,
                "speedup": default / ms if default and ms else None,
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """The rows as text, a line each."""
    lines = []
    for row in rows:
        case = row["case"]
        mask = "causal" if case["causal"] else "full"
        what = f"D = {case['dim']:<3} {mask:<6} p = {case['p']:<3}"
        said = "wrong: " if not row["correct"] else ""
        said += row["reason"] or f"{row['ms']:8.3f} ms  {row['speedup'] or 0:5.3f}x"
        lines.append(f"{what}  {row['variant']:<20} {said}")
    return "\n".join(lines)


def main() -> int:
    """The command; what was measured before it was cut off is in the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=240.0, help="for all, the build aside")
    parser.add_argument("--out", type=Path, default=Path("tune_cuda.json"), help="the file")
    args = parser.parse_args()
    rows: list[dict] = []
    try:
        if reason := unsupported_gpu(torch.device("cuda")):
            raise BuildError(reason)
        document = {"environment": environment.describe("cuda"), "rows": rows}
        with terminated_as_interrupted():
            for found in run(args.seconds):
                rows += found
                print(table(found), flush=True)
                args.out.write_text(json.dumps(document, indent=1) + "\n")
    except BuildError as error:
        print(f"tune_cuda: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    print(f"Written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
