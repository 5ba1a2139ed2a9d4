"""What an op is to a benchmark: problems, random inputs, implementations, bytes and FLOPs, errors.

Each file of this folder describes the ops of the file of the same name in kernels/. What an op's
bytes and FLOPs are is written there, once.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusedformer.benchmarks.environment import version
from fusedformer.kernels import dispatch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Forward without a gradient; forward that keeps what its backward needs; backward alone; one
# forward with its backward.
MODES = ("fwd", "fwd_grad", "bwd", "fwd_bwd")


def phases(mode: str) -> tuple[bool, bool]:
    """Whether a mode's time has the forward in it, and the backward."""
    return mode != "bwd", mode in ("bwd", "fwd_bwd")


def cost(mode: str, forward: float, backward: float) -> float:
    """A mode's operations or bytes, from those of forward and backward."""
    has_forward, has_backward = phases(mode)
    return float(forward * has_forward + backward * has_backward)


def ours(impl: str) -> bool:
    """Whether a name is this project's: "fused", or with a backend forced, as "fused-triton"."""
    return impl.partition("-")[0] == "fused"


def forced_backend(impl: str) -> "str | None":
    """The backend that a name of ours forces; None is the automatic choice."""
    return impl.partition("-")[2] or None


class Sizes:
    """Base of the dataclasses that hold one problem of an op."""

    dtype: str
    device: str
    dropout_p: float

    def at(self, **changes: Any) -> Any:
        """This problem with some fields changed."""
        own: Any = self  # a dataclass, as every class derived from this one is
        return replace(own, **changes)

    def as_dict(self) -> dict:
        """The fields, JSON-ready."""
        own: Any = self
        return asdict(own)


@dataclass(frozen=True)
class Held:
    """Random tensors of one problem: the arguments, some requiring gradients, and the output's."""

    args: list[Tensor]
    grad: Tensor

    def wanted(self) -> list[Tensor]:
        """The arguments whose gradients a backward gives."""
        return [tensor for tensor in self.args if tensor.requires_grad]

    def copy(self) -> "Held":
        """The same values in memory of their own."""
        args = [t.detach().clone().requires_grad_(t.requires_grad) for t in self.args]
        return Held(args, self.grad.clone())

    def exact(self) -> "Held":
        """The same values in float64; integers stay."""
        args = [
            t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for t in self.args
        ]
        return Held(args, self.grad.double())


def no_refusal(case: Any) -> "str | None":
    """For implementations that take every problem."""
    return None


@dataclass(frozen=True)
class Impl:
    """One implementation of an op.

    Args:
        about: one line for --list.
        make: a problem -> a function of its arguments; called once a process and problem.
        refuses: why it cannot take a problem, or None; imports what it needs.
        package: whose version a row names; "" for torch and this project.
        compiles: its first call takes long and much memory.
    """

    about: str
    make: Callable[[Any], Callable[..., Tensor]]
    refuses: Callable[[Any], "str | None"] = no_refusal
    package: str = ""
    compiles: bool = False

    def version(self) -> "str | None":
        """The version of its package, where it has one."""
        return version(self.package) if self.package else None


@dataclass(frozen=True)
class Op:
    """One op as the benchmarks know it.

    Args:
        name: of the op in fusedformer.
        case: the dataclass of its problems.
        inputs: a problem and a seed -> random tensors.
        impls: by name; "fused" is this project's, ``eager`` the formula in plain PyTorch.
        eager: the name of that one.
        flops, moved: operations, and bytes, of a problem and a mode, as the file says.
        seeded: a problem, a dropout seed and a backend -> this project's function of the arguments.
        compare: a problem, its tensors, output, gradients or None, and dropout seed or None ->
            relative errors against float64, "forward" and "backward"; None where there are none.
        checked: the problem at which errors are taken: the same, or a smaller one where float64
            would take too long.
        tiny: a problem -> one of its kind that takes no time and no memory.
        peak: an implementation's name and a problem -> a guess of the bytes beyond the inputs.
        x: the field that a sweep walks.
        modes: in which it can be measured.
    """

    name: str
    case: type
    inputs: Callable[[Any, int], Held]
    impls: Mapping[str, Impl]
    eager: str
    flops: Callable[[Any, str], float]
    moved: Callable[[Any, str], float]
    seeded: Callable[..., Callable[..., Tensor]]
    compare: "Callable[..., dict] | None"
    checked: Callable[[Any], Any]
    tiny: Callable[[Any], Any]
    peak: Callable[[str, Any], float]
    x: str
    modes: tuple[str, ...] = MODES


# --- Inputs and calls -----------------------------------------------------------------------------


def random(
    generator: torch.Generator, size: Sequence[int], case: Any, scale: float = 1.0
) -> Tensor:
    """Normal numbers of the problem's dtype, drawn in float32, on its device."""
    drawn = torch.randn(size, generator=generator, device=case.device) * scale
    return drawn.to(DTYPES[case.dtype])


def generator(case: Any, seed: int) -> torch.Generator:
    """A generator of the problem's device."""
    return torch.Generator(case.device).manual_seed(seed)


def backward_of(held: Held) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Takes an output to the gradients of the arguments that want one."""
    wanted = held.wanted()
    return lambda out: torch.autograd.grad(out, wanted, held.grad)


@contextlib.contextmanager
def backends_seen() -> Iterator[list[str]]:
    """The names of the backends that this project's ops ran on within the block, each once."""
    names: list[str] = []
    pick, straight = dispatch.pick, dispatch.straight_to_cpu

    def seen(op: str, module: Any) -> Any:
        for name, path in dispatch.BACKENDS.items():
            if path.format(file=dispatch.OPS[op]) == module.__name__ and name not in names:
                names.append(name)
        return module

    def straight_seen(op: str, tensors: tuple) -> Any:
        module = straight(op, tensors)
        return module and seen(op, module)

    dispatch.pick = lambda op, *rest: seen(op, pick(op, *rest))
    dispatch.straight_to_cpu = straight_seen
    try:
        yield names
    finally:
        dispatch.pick, dispatch.straight_to_cpu = pick, straight


# --- Packages that may be missing -----------------------------------------------------------------


@functools.cache
def missing(module: str) -> "str | None":
    """Why a module cannot be imported, in one line; or None: it is imported then."""
    try:
        importlib.import_module(module)
    except Exception as error:  # some packages raise RuntimeError or OSError where no GPU is
        if isinstance(error, ModuleNotFoundError) and (error.name or "") == module.split(".")[0]:
            return f"{module.split('.')[0]} is not installed"
        lines = str(error).strip().splitlines()
        return f"{module} cannot be imported: {type(error).__name__}: {lines[0] if lines else ''}"
    return None


def needs(
    module: str, *, gpu: bool = True, dropout: bool = True, bits: "int | None" = None
) -> Callable[[Any], "str | None"]:
    """A refusal for implementations of other packages.

    Args:
        module: what must be importable.
        gpu: it is measured on CUDA alone.
        dropout: it has dropout.
        bits: 16 where it takes no float32.
    """

    def refuses(case: Any) -> "str | None":
        if reason := missing(module):
            return reason
        if gpu and case.device != "cuda":
            return "it is measured on CUDA GPUs alone"
        if not dropout and case.dropout_p:
            return "it has no dropout"
        if bits == 16 and case.dtype == "fp32":
            return "it takes 16-bit dtypes alone"
        return None

    return refuses


@functools.cache
def compiled(function: Callable) -> Callable:
    """torch.compile of a function, for fixed shapes; one for each process."""
    return torch.compile(function, dynamic=False)


@functools.cache
def no_compiler(device: str) -> "str | None":
    """Why torch.compile cannot run on "cpu" or "cuda" here, or None."""
    try:
        compiled(lambda x: x + 1)(torch.ones(1, device=device))
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"torch.compile fails: {lines[0] if lines else type(error).__name__}"
    return None


# --- Errors ---------------------------------------------------------------------------------------


class Distance:
    """|got - truth| / |truth| in the L2 norm, of a tensor that comes in parts."""

    def __init__(self) -> None:
        self._difference = 0.0
        self._truth = 0.0

    def add(self, got: Tensor, truth: Tensor) -> None:
        """One more part; a NaN in it makes the distance NaN."""
        truth = truth.detach().double()
        self._difference += float((got.detach().double() - truth).square().sum())
        self._truth += float(truth.square().sum())

    def value(self) -> float:
        """The distance so far; where the truth is all zero, that of the difference itself."""
        return (self._difference / (self._truth or 1.0)) ** 0.5
