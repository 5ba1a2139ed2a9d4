"""What reaches the driver of a launch, for tests; runs in a worker of aot.

The driver is a double: Triton compiles for sm_90, and what would be launched is kept.
"""

from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget


@triton.jit(do_not_specialize=["fixed"])
def small_kernel(x_ptr, y_ptr, n, wide: tl.int64, fixed, scale, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    if y_ptr is not None:
        tl.store(y_ptr + at * wide, x.to(tl.float32) * scale + fixed, mask=at < n)


class Driver:
    """Of a GPU that takes every launch and runs none."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (0, hash(binary), 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        def run(*given: Any) -> None:
            where = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in given[9:]]
            self.seen.append((given[:3], *given[3:6], where))

        return run


def variants() -> "dict[str, tuple[tuple, dict]]":
    """Arguments of small_kernel: one set, and others that each differ from it in one of them."""
    x, y = torch.zeros(4096, dtype=torch.bfloat16), torch.zeros(4096)
    args, options = (x, y, 17, 17, 17, 0.5), {"BLOCK": 1024, "num_warps": 4}
    found = {"first": (args, options)}
    changes = {
        "elsewhere": (0, x.clone()), "unaligned": (0, x[1:]), "dtype": (0, x.half()),
        "none": (1, None), "divisible": (2, 16), "one": (2, 1), "large": (2, 2**31),
        "wide": (3, 16), "fixed": (4, 16), "fixed large": (4, 2**40), "scale": (5, 2.0),
    }  # fmt: skip
    for name, (index, value) in changes.items():
        found[name] = (*args[:index], value, *args[index + 1 :]), options
    found["constexpr"] = args, options | {"BLOCK": 2048}
    found["warps"] = args, options | {"num_warps": 8}
    return found


def launches() -> "dict[str, tuple[list, int]]":
    """For each variant: what Triton's own launch and launch(), three times, gave to the driver;
    and how often launch() took Triton's own way."""
    from fusedformer.kernels.triton import launch as module

    driver = Driver()
    triton.runtime.driver.set_active(driver)
    own, count = small_kernel.run, 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return own(*args, **options)

    found = {}
    small_kernel.run = counted
    for name, (args, options) in variants().items():
        driver.seen = []
        small_kernel[(3,)](*args, **options)
        count = 0
        for _ in range(3):
            module.launch(small_kernel, (3,), *args, **options)
        found[name] = driver.seen, count
    return found


def hashes(names: list[str]) -> list[tuple[str, str]]:
    """Of tune's branches: the hash of what is compiled ahead, and of what a launch compiles."""
    from fusedformer.benchmarks import tune, tune_branches
    from fusedformer.kernels.triton import launch

    found, chip = [], launch.Chip(90, 132)
    for branch in tune_branches.branches():
        if branch.name in names:
            with launch.recording(chip):
                call = branch.make("meta")
            (entry,) = tune_branches.launches(branch, branch.candidates[-1], call, chip)[1]
            ahead = tune.ahead(entry, 90)
            triton.runtime.driver.set_active(Driver())
            entry.kernel.device_caches.clear()  # but for what is on disk
            by_launch = entry.kernel[entry.grid](*entry.args, **entry.options)
            found.append((ahead.hash, by_launch.hash))
    return found
