"""What the machine can do at best, measured: copy bandwidth, matrix products, one launch.

Rooflines and shares of a ceiling are against these, not against a data sheet. These functions run
inside worker processes.
"""

import torch

from fusedformer.benchmarks import timing
from fusedformer.benchmarks.ops import common

# Bytes of the tensor that is copied, and the side of the square matrices: well past every cache,
# and under a second of measuring on each device.
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
_SIDE = {"cpu": 2048, "cuda": 8192}
_SECONDS = 0.5


def measure(device: str) -> dict:
    """The ceilings of "cpu" or "cuda".

    Returns:
        "copy_gbps": bytes read and written per second of a large copy, 1e9 a unit;
        "matmul_tflops": dtype -> 1e12 operations per second of a large square product of random
        matrices, by the fastest way that torch has (on a GPU also "tf32", that of float32 with TF32
        allowed);
        "call_us": the calling thread's microseconds for one small in-place addition.
    """
    clock = timing.clock_for(device)
    copy = _copy(device, clock)
    products = {name: _product(device, name, clock) for name in common.DTYPES}
    if device == "cuda":
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        products["tf32"] = _product(device, "fp32", clock)
        torch.backends.cuda.matmul.allow_tf32 = before
    else:
        # float16 has no library where the processor has none of it; float32 holds its numbers.
        products["fp16"] = max(products[name] or 0.0 for name in ("fp16", "fp32"))
    one = torch.zeros(1, device=device)
    call = _best(lambda: one.add_(1), timing.clock_for(device, host=True))
    return {
        "copy_gbps": copy,
        "matmul_tflops": products,
        "call_us": call * 1e3,
    }


def _copy(device: str, clock: timing.Clock) -> float:
    source = torch.randint(2**31, (_COPY_BYTES[device] // 8,), device=device)  # 8 bytes each
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), clock) / 1e6


def _product(device: str, dtype: str, clock: timing.Clock) -> "float | None":
    """Of a product as it is written; of float32 on a CPU also by oneDNN.

    What torch calls there by itself may leave half of the machine alone: MKL takes AVX2 on an AMD
    processor with AVX-512.
    """
    side = _SIDE[device]
    found = []
    if (device, dtype) == ("cpu", "fp32") and torch.backends.mkldnn.is_available():
        a, b = (torch.randn(side, side).to_mkldnn() for _ in range(2))
        found.append(2 * side**3 / _best(lambda: torch.nn.functional.linear(a, b), clock) / 1e9)
    if device == "cpu" and dtype == "fp16":
        side //= 4  # without hardware for it, torch takes long
    try:
        a, b = (torch.randn(side, side, device=device).to(common.DTYPES[dtype]) for _ in range(2))
        found.append(2 * side**3 / _best(lambda: a @ b, clock) / 1e9)
    except RuntimeError:  # a dtype that this device cannot multiply
        pass
    return max(found, default=None)


def _best(call: timing.Call, clock: timing.Clock) -> float:
    """Milliseconds of a call: the median of rounds."""
    found = timing.time_interleaved(
        {"": timing.whole([call])}, clock, seconds=_SECONDS, min_rounds=3, max_rounds=50, warmup=2
    )[""]
    if "error" in found:
        raise found["error"]
    return timing.quantile(found["ms"], 0.5)
