"""``fusedformer aot``: compiles the Triton kernels without a GPU and holds them to budgets.

The launchers run on meta tensors while their launches are recorded, so that what is compiled is
what a GPU would have run. Reported for each kernel: registers, stack (spills), shared memory and
the matrix instruction. A run fails on

- a spill in float16 or bfloat16 on sm_80 and sm_90, elsewhere above the ceiling in SPILL_CEILING;
- shared memory above the chip's limit;
- sm_90 attention in 16 bits with a tile of 64 queries or more that does not use wgmma.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fusedformer import aot_cases, aot_row_cases

# Shared memory that one block may have, in bytes (CUDA C++ Programming Guide, "Compute
# Capabilities"), and multiprocessors of the chip's best known GPU.
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
MULTIPROCESSORS = {80: 108, 89: 128, 90: 132, 100: 148, 120: 170}

# Bytes of stack a thread that are accepted: float32 anywhere, 16 bits outside sm_80 and sm_90.
SPILL_CEILING = {32: 512, 16: 64}

CASES = aot_cases.CASES | aot_row_cases.CASES

_MATRIX = (
    ("wgmma", r"\bwgmma\.mma_async"),
    ("tcgen05", r"\btcgen05\.mma"),
    ("mma", r"\bmma\.sync"),
)

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass
class Report:
    """What one compiled kernel needs, and which budgets it breaks."""

    case: str
    kernel: str
    capability: int
    bits: int  # of the case's floating dtype
    options: dict[str, Any]
    registers: int = 0  # per thread
    stack: int = 0  # bytes per thread; not zero when registers are spilled
    shared: int = 0  # bytes per block
    matrix: str = "-"
    faults: list[str] = field(default_factory=list)


def signature(kernel: Any, args: tuple, options: dict) -> tuple[dict, dict, dict]:
    """Types, constants and attributes of a launch, as Triton's own launch would derive them."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple, list] = {}
    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if isinstance(value, torch.Tensor):
            types[parameter.name] = _POINTERS[value.dtype]
            attributes[index,] = [["tt.divisibility", 16]]
        elif (
            parameter.is_constexpr
            or value is None
            or (value == 1 and not parameter.do_not_specialize)
        ):
            if isinstance(value, float) and not parameter.is_constexpr:
                types[parameter.name] = "fp32"
                continue
            types[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, bool):
            types[parameter.name] = "i1"
        elif isinstance(value, int):
            small = -(2**31) <= value < 2**31
            types[parameter.name] = parameter.annotation_type or ("i32" if small else "i64")
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[index,] = [["tt.divisibility", 16]]
        else:
            types[parameter.name] = "fp32"
    return types, constants, attributes


def _resources(cubin: bytes, cuobjdump: str) -> tuple[int, int]:
    """Registers and stack bytes per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def compile_case(name: str, capability: int) -> list[Report]:
    """Compiles every kernel that a case of aot_cases launches on a chip of this capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fusedformer.kernels.triton import launch

    if launch.INTERPRETED:
        raise RuntimeError("aot: TRITON_INTERPRET must not be set: the interpreter cannot compile")
    case = CASES[name]
    with launch.recording(launch.Chip(capability, MULTIPROCESSORS[capability])) as launches:
        case.call()
    reports = []
    for entry in launches:
        options = {k: v for k, v in entry.options.items() if k in ("num_warps", "num_stages")}
        constexprs = {k: v for k, v in entry.options.items() if k not in options}
        types, constants, attributes = signature(entry.kernel, entry.args, constexprs)
        compiled = triton.compile(
            ASTSource(entry.kernel, types, constants, attributes),
            target=GPUTarget("cuda", capability, 32),
            options=options,
        )
        report = Report(name, entry.kernel.__name__, capability, case.bits, entry.options)
        cuobjdump = triton.knobs.nvidia.cuobjdump.path
        report.registers, report.stack = _resources(compiled.asm["cubin"], cuobjdump)
        report.shared = compiled.metadata.shared
        ptx = compiled.asm["ptx"]
        report.matrix = next((name for name, text in _MATRIX if re.search(text, ptx)), "-")
        report.faults = faults(report)
        reports.append(report)
    return reports


def faults(report: Report) -> list[str]:
    """The budgets that a report breaks, as sentences."""
    broken = []
    strict = report.bits == 16 and report.capability in (80, 90)
    ceiling = 0 if strict else SPILL_CEILING[report.bits]
    if report.stack > ceiling:
        broken.append(f"{report.stack} bytes of stack a thread, over {ceiling}")
    if report.shared > SHARED_LIMIT[report.capability]:
        limit = SHARED_LIMIT[report.capability]
        broken.append(f"{report.shared} bytes of shared memory, over {limit}")
    tile = report.options.get("BLOCK_M", 0)
    attends = report.case.startswith("attention") and "BLOCK_N" in report.options
    if attends and report.bits == 16 and report.capability == 90 and tile >= 64:
        if report.matrix != "wgmma":
            broken.append(f"uses {report.matrix}, not wgmma")
    return broken


def _line(report: Report) -> str:
    options = report.options
    tile = "x".join(str(options[k]) for k in ("BLOCK_M", "BLOCK_N", "BLOCK_D") if k in options)
    return (
        f"sm_{report.capability:<4}{report.kernel:<36}{tile:<12}{options.get('num_warps', 4):>2} warps"
        f"{report.registers:>5} regs{report.stack:>6} B stack{report.shared:>8} B shared  "
        f"{report.matrix:<8}{report.case}" + "".join(f"  FAULT: {f}" for f in report.faults)
    )


def _worker(task: tuple[str, int]) -> list[Report]:
    return compile_case(*task)


def compile_all(tasks: Iterable[tuple[str, int]], jobs: int) -> Iterable[list[Report]]:
    """Reports of each (case, capability), in order, made by ``jobs`` processes."""
    # Workers import the kernels anew: the interpreter, if this process has it, is not for them.
    os.environ.pop("TRITON_INTERPRET", None)
    import multiprocessing

    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_worker, tasks)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--arch", nargs="*", type=int, default=list(SHARED_LIMIT), metavar="SM",
        help="compute capabilities, such as 80 90 (default: all)",
    )  # fmt: skip
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds TEXT")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--json", metavar="FILE", help="write the reports there as JSON")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")


def run(args: argparse.Namespace) -> int:
    """Compiles, prints a line a kernel, and returns 1 if a budget is broken."""
    names = [name for name in CASES if args.only in name]
    unknown = [arch for arch in args.arch if arch not in SHARED_LIMIT]
    if unknown or not names:
        wanted = f"--arch takes {', '.join(map(str, SHARED_LIMIT))}; got {unknown}"
        raise ValueError(wanted if unknown else f"--only: no case's name holds {args.only!r}")
    if args.list:
        print("\n".join(names))
        return 0
    reports: list[Report] = []
    for group in compile_all([(n, arch) for arch in args.arch for n in names], args.jobs):
        for report in group:
            print(_line(report), flush=True)
            reports.append(report)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump([asdict(report) for report in reports], file, indent=1)
    broken = sum(bool(report.faults) for report in reports)
    print(f"{len(reports)} kernels compiled, {broken} over budget")
    return 1 if broken else 0


if __name__ == "__main__":
    _parser = argparse.ArgumentParser()
    configure(_parser)
    sys.exit(run(_parser.parse_args()))
