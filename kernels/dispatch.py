"""Which backend runs an op: names, order of preference, reasons. Knows no maths.

A backend of an op is a module with ``<op>_fwd``, ``<op>_bwd``, ``<op>_unsupported`` (a reason why
it cannot take a call, or None) and ``unsupported_device`` (the same for a device). Named
explicitly, a backend runs or raises; only the automatic choice falls through the order.
"""

import contextlib
import importlib
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_unary

from fusedformer.kernels.checks import PLAIN_TENSORS, check_strided, device_type

# Where each backend keeps an op: "{file}" is the op's file name, the same in every folder.
BACKENDS = {
    "reference": "fusedformer.kernels.reference",
    "triton": "fusedformer.kernels.triton.{file}",
    "cpu": "fusedformer.kernels.native",
    "cuda": "fusedformer.kernels.cuda.attention",  # which is all it has
}

# op -> its file name. Filled by each op's own file, through define().
OPS: dict[str, str] = {}

# Public functions that are cases of an op, for available_backends().
PART_OF = {
    "layer_norm": "dropout_add_layer_norm",
    "rms_norm": "dropout_add_layer_norm",
    "scaled_dot_product_attention": "attention",
}

# What the automatic choice tries on a device type, best first; any other device: reference.
# "cuda" is not among them: it becomes the default on a class of GPUs only when a committed result
# file (benchmarks/results/) shows it right and faster there. Until then it is to be named.
PREFERENCE = {
    "cuda": ("triton", "reference"),
    "cpu": ("cpu", "reference"),
}

AUTOMATIC = ""

# Private, but what torch's own Python asks; where they are no more, something may always look on.
transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
# What autograd hands to a backward under is_grads_batched: of class Tensor, but a batch of them.
_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda _: True)
_is_zero = getattr(torch, "_is_zerotensor", lambda _: True)  # a tensor without memory
_profiled = getattr(torch.autograd, "_profiler_enabled", lambda: True)

# Classes of arguments that are what they seem.
_TENSORS: frozenset[type] = frozenset(PLAIN_TENSORS)
_PLAIN: frozenset[type] = _TENSORS.union((torch.dtype, type(None), bool, int, float, str, list))

_default = AUTOMATIC
_modules: dict[tuple[str, str], ModuleType | None] = {}
_failures: dict[tuple[str, str], str] = {}
_questions: dict[tuple[str, str, bool], tuple[ModuleType, Callable[..., "str | None"]]] = {}
_warned: set[str] = set()
_library = torch.library.Library("fusedformer", "DEF")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, calls that name no backend use this one (process-wide, not per thread).

    Raises:
        ValueError: name is not a backend's name.
    """
    global _default
    if name is None:
        raise ValueError(f"use_backend: backend must be one of {', '.join(BACKENDS)}; got None")
    before, _default = _default, checked("use_backend", name)
    try:
        yield
    finally:
        _default = before


def checked(op: str, backend: "str | None") -> str:
    """The backend argument of a public function as the string that its op takes.

    Raises:
        ValueError: backend is not a backend's name.
    """
    if backend is None:
        return _default
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


def unobserved(args: tuple, classes: frozenset[type] = _PLAIN, gpu: bool = True) -> bool:
    """Whether calling an op with these arguments is no more than computing it, on a CPU or ``gpu``.

    Not so where something else would see the call, and perhaps take it over: compilers, transforms,
    modes, profilers, tensors of other classes. On a GPU a kernel reads memory as it lies, so there
    the op has to resolve lazy tensors first; on a CPU the backends call ops themselves. (A kernel
    that somebody else registers for one of our ops is for the long way alone.)
    """
    return (
        not torch.compiler.is_compiling()
        and classes.issuperset(map(type, args))
        and (args[0].is_cpu or (gpu and args[0].is_cuda and not _any_lazy(args)))
        and not has_torch_function_unary(args[0])  # modes: no class here has one
        and not _dispatch_modes()
        and not transforms_active()
        and torch._C._get_tracing_state() is None
        and not _profiled()
    )


def _any_lazy(args: tuple) -> bool:
    """Whether the memory of a tensor is not what it stands for: a negative, zeros without any."""
    return any(x.is_neg() or _is_zero(x) for x in args if isinstance(x, Tensor))


def unobserved_backward(args: tuple) -> bool:
    """The same of a backward op, whose arguments start with one gradient or two."""
    return (
        unobserved(args)
        and not _is_batched(args[0])
        and not (isinstance(args[1], Tensor) and _is_batched(args[1]))
    )


def alone_on_cpu(tensors: "tuple[Any, ...]") -> bool:
    """Whether an eager call with these arguments is no more than a kernel of the CPU backend.

    It is so where the choice is that backend, nothing looks on, and ``tensors`` are what they are
    called: nobody need have checked them.
    """
    return (
        unobserved(tensors, _TENSORS, False)
        and (_default or PREFERENCE["cpu"][0]) == "cpu"
        and forward_ad._current_level < 0  # tangents: no_grad() leaves them on
        and not torch.is_autocast_enabled("cpu")
    )


def straight_to_cpu(op: str, tensors: "tuple[Any, ...]") -> "ModuleType | None":
    """The CPU backend, where a call is alone_on_cpu(), forward and backward; else None.

    The first call of an op never is, for its choice of a backend is what loads the module.
    """
    return _modules.get(("cpu", op)) if alone_on_cpu(tensors) else None


def define(
    op: str, file: str, schema: str, impl: Callable[..., Any], fake: Callable
) -> Callable[..., Any]:
    """register() of what is part of ``op``, whose file is ``file``; impl chooses by pick()."""
    OPS[op] = file
    return register(schema, impl, fake)


def register(schema: str, impl: Callable[..., Any], fake: Callable) -> Callable[..., Any]:
    """Makes ``torch.ops.fusedformer.<name of schema>``; impl serves every device, fake shapes.

    Returns:
        What calls the op, by the shortest way.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusedformer::{name}", fake, lib=_library)
    registered = getattr(torch.ops.fusedformer, name).default

    def call(*args: Any) -> Any:
        if not unobserved(args):
            return registered(*args)
        try:
            return impl(*args)
        except RuntimeError:
            # Asked afterwards, as what is usual should not pay for it.
            for argument, value in zip(registered._schema.arguments, args, strict=True):
                if isinstance(value, Tensor):
                    check_strided(name.removesuffix("_fwd"), argument.name, value)
            raise

    def call_backward(*args: Any) -> Any:
        return impl(*args) if unobserved_backward(args) else registered(*args)

    return call_backward if name.endswith("_bwd") else call


def load(backend: str, op: str) -> "ModuleType | None":
    """The module of a backend that holds an op, or None: failure() then has the reason."""
    key = (backend, op)
    if key not in _modules:
        try:
            _modules[key] = importlib.import_module(BACKENDS[backend].format(file=OPS[op]))
        except Exception:
            # Whatever stops an import is a reason to use another backend; it is kept and shown.
            _modules[key] = None
            _failures[key] = traceback.format_exc()
    return _modules[key]


def failure(backend: str, op: str) -> "str | None":
    """The traceback of a backend's failed import, or None."""
    return _failures.get((backend, op))


def _able(
    backend: str, op: str, *args: Any, device: bool = False
) -> "tuple[ModuleType | None, str]":
    """The module, if it takes a call with these args (with ``device``: that device); or why not."""
    asked = _questions.get((backend, op, device))
    if asked is None:
        module = load(backend, op)
        if module is None:
            last_line = _failures[backend, op].strip().splitlines()[-1]
            return None, f"it cannot be imported ({last_line})"
        # linear_cross_entropy has no kernels but those of its file's op.
        if not any(hasattr(module, f"{name}_unsupported") for name in (op, OPS[op])):
            return None, "it does not have this op yet"
        question = "unsupported_device" if device else f"{op}_unsupported"
        asked = _questions[backend, op, device] = module, getattr(module, question)
    module, unsupported = asked
    reason = unsupported(*args)
    return (module, "") if reason is None else (None, reason)


def available_backends(op: str = "attention", device: str = "cpu") -> "dict[str, str | None]":
    """For each backend, None when it can run ``op`` on ``device``, else the reason why not."""
    op = PART_OF.get(op, op)
    if op not in OPS:
        raise ValueError(f"available_backends: op must be one of {', '.join(OPS)}; got {op!r}")
    where = torch.device(device)
    return {name: _able(name, op, where, device=True)[1] or None for name in BACKENDS}


def pick(op: str, backend: str, args: tuple) -> ModuleType:
    """The module that runs a call of ``op`` with these arguments (the first one a tensor).

    Raises:
        RuntimeError: the backend named explicitly cannot run; the message says why.
    """
    if backend:
        module, reason = _able(backend, op, *args)
        if module is None:
            raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}")
        return module
    device = device_type(args[0])
    reasons = []
    for name in PREFERENCE.get(device, ("reference",)):
        module, reason = _able(name, op, *args)
        if module is not None:
            break
        reasons.append(f"{name}: {reason}")
    else:
        raise RuntimeError(f"{op}: no backend can run: {'; '.join(reasons)}")
    if name == "reference" and device != "cpu" and op not in _warned:
        _warned.add(op)
        why = "; ".join(reasons) or f"there are no fused kernels for {device} devices"
        warnings.warn(f"{op} runs on the slow reference backend on {device} ({why})", stacklevel=2)
    return module


def why_not_fused(op: str, device: torch.device, dtype: torch.dtype) -> "str | None":
    """Why the automatic choice would be ``reference``; None where not, or use_backend() names one.

    It answers for calls of ordinary sizes; pick() asks again with the tensors themselves.
    """
    if _default:
        return None
    if dtype == torch.float64:
        return "float64 runs on the reference backend only"
    reasons = []
    for name in PREFERENCE.get(device.type, ()):
        if name != "reference":
            module, reason = _able(name, op, device, device=True)
            if module is not None:
                return None
            reasons.append(f"{name}: {reason}")
    return "; ".join(reasons) or f"there are no fused kernels for {device.type} devices"
