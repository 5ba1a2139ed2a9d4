"""``fusedformer aot``: compiles the Triton kernels without a GPU and holds them to budgets.

The launchers run on meta tensors while their launches are recorded, so that what is compiled is
what a GPU would have run. Reported for each kernel: registers, stack (spills), shared memory and
the matrix instruction. A run fails on

- a spill in float16 or bfloat16 on sm_80 and sm_90, elsewhere above the ceiling in SPILL_CEILING;
- shared memory above the chip's limit;
- sm_90 attention in 16 bits with a tile of 64 queries or more that does not use wgmma;
- a product of float32 matrices that is rounded to TF32, Triton's default on a GPU;
- a kernel that does not compile.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch

from fusedformer import aot_cases, aot_loss_cases, aot_row_cases

# Shared memory that one block may have, in bytes (CUDA C++ Programming Guide, "Compute
# Capabilities"), and multiprocessors of the chip's best known GPU.
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
MULTIPROCESSORS = {80: 108, 89: 128, 90: 132, 100: 148, 120: 170}

# Bytes of stack a thread that are accepted: float32 anywhere, 16 bits outside sm_80 and sm_90.
SPILL_CEILING = {32: 768, 16: 64}

CASES = aot_cases.CASES | aot_row_cases.CASES | aot_loss_cases.CASES

_MATRIX = (
    ("wgmma", r"\bwgmma\.mma_async"),
    ("tcgen05", r"\btcgen05\.mma"),
    ("mma", r"\bmma\.sync"),
)

# In Triton's IR: no word is full float32, "tf32x3" three products that together are as accurate.
_ROUNDED = re.compile(r"\binputPrecision = tf32\b")

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*u1",
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
    rounded: int = 0  # products of float32 matrices in TF32, 10 bits of 23
    faults: list[str] = field(default_factory=list)


def signature(kernel: Any, args: tuple, options: dict) -> tuple[dict, dict, dict]:
    """Types, constants and attributes of a launch, as Triton's own launch would derive them.

    Args:
        kernel: a JITFunction.
        args: its first arguments; tensors count as aligned to 16 bytes, as torch allocates them.
        options: the other ones, by name.
    """
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple, list] = {}
    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    for index, parameter in enumerate(kernel.params):
        name, value, annotated = parameter.name, given[parameter.name], parameter.annotation_type
        special = not parameter.do_not_specialize
        number = isinstance(value, int) and not isinstance(value, bool)
        if (
            parameter.is_constexpr
            or value is None
            or (number and value == 1 and special and not annotated)
        ):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = _POINTERS[value.dtype]
            if special:
                attributes[index,] = [["tt.divisibility", 16]]
        elif number:
            small = -(2**31) <= value < 2**31
            types[name] = annotated or ("i32" if small else "i64")
            if special and value % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
        else:
            types[name] = "u1" if isinstance(value, bool) else "fp32"
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


def launches(case: aot_cases.Case, capability: int) -> list:
    """What a case would launch on a chip of this capability."""
    from fusedformer.kernels.triton import launch

    chip = launch.Chip(capability, MULTIPROCESSORS[capability])
    with launch.recording(chip) as recorded:
        case.call()
    return recorded


def split_options(options: dict) -> tuple[dict, dict]:
    """The options of a launch: constexpr arguments, and what the compiler takes."""
    compiler = {k: v for k, v in options.items() if k in ("num_warps", "num_stages")}
    return {k: v for k, v in options.items() if k not in compiler}, compiler


def compiled(entry: Any, capability: int) -> Any:
    """A recorded launch as Triton compiles it for a chip of this capability: a CompiledKernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constexprs, options = split_options(entry.options)
    return triton.compile(
        ASTSource(entry.kernel, *signature(entry.kernel, entry.args, constexprs)),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )


def _measure(report: Report, found: Any) -> None:
    """Fills in a report on a CompiledKernel."""
    import triton

    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    report.registers, report.stack = _resources(found.asm["cubin"], cuobjdump)
    report.shared = found.metadata.shared
    report.rounded = len(_ROUNDED.findall(found.asm["ttir"]))
    ptx = found.asm["ptx"]
    report.matrix = next((name for name, text in _MATRIX if re.search(text, ptx)), "-")


def compile_launch(
    case: str,
    bits: int,
    capability: int,
    entry: Any,
    compiler: Callable[[Any, int], Any] = compiled,
) -> Report:
    """Compiles a recorded launch; a kernel that does not compile is a fault, not an exception."""
    # Triton's own types, such as that of a constexpr dtype, stay in the worker.
    options = {k: v if isinstance(v, int) else str(v) for k, v in entry.options.items()}
    report = Report(case, entry.kernel.__name__, capability, bits, options)
    try:
        _measure(report, compiler(entry, capability))
        report.faults = faults(report)
    except Exception as error:
        report.faults = [_reason("does not compile", error)]
    return report


def compile_case(name: str, capability: int) -> list[Report]:
    """Compiles every kernel that a case launches on a chip of this capability."""
    from fusedformer.kernels.triton import launch

    if launch.INTERPRETED:
        raise RuntimeError("aot: TRITON_INTERPRET must not be set: the interpreter cannot compile")
    case = CASES[name]
    try:
        entries = launches(case, capability)
    except Exception as error:
        return [_failed(name, capability, _reason("cannot be launched", error))]
    return [compile_launch(name, case.bits, capability, entry) for entry in entries]


def _reason(what: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{what}: {type(error).__name__}: {lines[-1] if lines else ''}".rstrip(": ")


def _failed(name: str, capability: int, fault: str) -> Report:
    """The report on a case whose kernels were not reached."""
    return Report(name, "-", capability, CASES[name].bits, {}, faults=[fault])


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
    tensor_cores = attends and report.bits == 16 and report.capability == 90 and tile >= 64
    if tensor_cores and report.matrix != "wgmma":
        broken.append(f"uses {report.matrix}, not wgmma")
    if report.rounded:
        broken.append(f"rounds the float32 of {report.rounded} products to TF32")
    return broken


_TILE = ("ROWS", "BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK", "COLUMNS")


def _line(report: Report) -> str:
    tile = "x".join(str(report.options[name]) for name in _TILE if name in report.options)
    warps = report.options.get("num_warps", 4)
    return (
        f"sm_{report.capability:<4}{report.kernel:<36}{tile:<12}{warps:>2} warps"
        f"{report.registers:>5} regs{report.stack:>6} B stack{report.shared:>8} B shared  "
        f"{report.matrix:<8}{report.case}" + "".join(f"  FAULT: {f}" for f in report.faults)
    )


def summary(reports: list[Report]) -> str:
    """A line a kernel: how often it was compiled, and the most that it needs."""
    lines = [
        f"{'kernel':<36}{'compiled':>9}{'regs':>6}{'stack':>7}{'shared':>8}{'faults':>8}  matrix"
    ]
    for kernel in dict.fromkeys(report.kernel for report in reports):
        own = [report for report in reports if report.kernel == kernel]
        most = [max(getattr(r, name) for r in own) for name in ("registers", "stack", "shared")]
        matrix = ", ".join(sorted({r.matrix for r in own} - {"-"})) or "-"
        broken = sum(bool(report.faults) for report in own)
        lines.append(
            f"{kernel:<36}{len(own):>9}{most[0]:>6}{most[1]:>7}{most[2]:>8}{broken:>8}  {matrix}"
        )
    return "\n".join(lines)


def _start_worker() -> None:
    # Before Triton is imported: the interpreter, if this process's parent has it, compiles nothing.
    os.environ.pop("TRITON_INTERPRET", None)
    # An interrupt ends a worker at once and silently; the parent says what there is to say.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def worker_pool(jobs: int) -> ProcessPoolExecutor:
    """Processes in which Triton compiles, whether or not it interprets in this one."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker)


Result = TypeVar("Result")


def in_workers(
    function: Callable[..., Result],
    tasks: Iterable[tuple],
    jobs: int,
    crashed: Callable[..., Result],
) -> Generator[Result, None, None]:
    """function(*task) of each task, in order, by ``jobs`` processes.

    A compiler that crashes takes its process along: such a task's result is crashed(*task).
    """
    left = list(tasks)
    while left:
        try:
            with worker_pool(min(jobs, len(left))) as pool:
                try:
                    for result in pool.map(function, *zip(*left, strict=True)):
                        del left[0]
                        yield result
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)  # who asked may have enough
        except BrokenProcessPool:
            # It was one of those at work: each of them now has a process of its own.
            suspects, left = left[:jobs], left[jobs:]
            with ThreadPoolExecutor(len(suspects)) as threads:
                yield from threads.map(lambda task: _alone(function, task, crashed), suspects)


def _alone(
    function: Callable[..., Result], task: tuple, crashed: Callable[..., Result]
) -> Result:
    with worker_pool(1) as pool:
        try:
            return pool.submit(function, *task).result()
        except BrokenProcessPool:
            return crashed(*task)


def compile_all(tasks: Iterable[tuple[str, int]], jobs: int) -> Iterator[list[Report]]:
    """Reports of each (case, capability), in order, made by ``jobs`` processes."""

    def crashed(name: str, capability: int) -> list[Report]:
        return [_failed(name, capability, "the compiler crashed")]

    yield from in_workers(compile_case, tasks, jobs, crashed)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--arch", nargs="+", type=int, default=list(SHARED_LIMIT), metavar="SM",
        help="compute capabilities, such as 80 90 (default: all)",
    )  # fmt: skip
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds TEXT")
    parser.add_argument("--quick", action="store_true", help="the few cases that the tests compile")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--json", metavar="FILE", help="write the reports there as JSON")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")


def _checked(args: argparse.Namespace) -> list[str]:
    """The names of the cases that are asked for."""
    unknown = [arch for arch in args.arch if arch not in SHARED_LIMIT]
    if unknown:
        raise ValueError(f"--arch takes {', '.join(map(str, SHARED_LIMIT))}; got {unknown[0]}")
    if args.jobs < 1:
        raise ValueError(f"--jobs must be 1 or more; got {args.jobs}")
    names = [n for n, case in CASES.items() if args.only in n and (case.quick or not args.quick)]
    if not names:
        kind = "quick case" if args.quick else "case"
        raise ValueError(f"--only: no {kind}'s name holds {args.only!r}")
    return names


def run(args: argparse.Namespace) -> int:
    """Compiles, prints a line a kernel, and returns 1 if a budget is broken."""
    names = _checked(args)
    if args.list:
        print("\n".join(names))
        return 0
    if importlib.util.find_spec("triton") is None:
        raise ValueError("Triton is not installed here, and nothing can be compiled without it")
    if args.json:
        open(args.json, "a").close()  # that it cannot be written shows now, not at the end
    reports: list[Report] = []
    try:
        for group in compile_all([(n, arch) for arch in args.arch for n in names], args.jobs):
            for report in group:
                print(_line(report), flush=True)
                reports.append(report)
    finally:
        # What was compiled before an interrupt is not lost.
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump([asdict(report) for report in reports], file, indent=1)
    broken = sum(bool(report.faults) for report in reports)
    print(f"\n{summary(reports)}\n\n{len(reports)} kernels compiled, {broken} over budget")
    return 1 if broken else 0
