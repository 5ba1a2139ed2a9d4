"""``fusedformer doctor``: what each op runs on here, and the reason for all that does not run."""

import argparse
import importlib
import importlib.metadata
import json
import platform
import textwrap
from pathlib import Path
from typing import Any

import torch

import fusedformer
from fusedformer.kernels import dispatch

SCHEMA_VERSION = 1


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(args: argparse.Namespace) -> int:
    report = examine()
    print(json.dumps(report, indent=2) if args.json else text(report))
    return 0


def examine() -> dict[str, Any]:
    """Everything that doctor prints, as JSON has it."""
    devices = _devices()
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": _versions(),
        "native": _native("cpu"),
        "cuda": _native("cuda"),
        "transformers": _transformers(),
        "devices": devices,
        "ops": [_op(op, device["name"]) for device in devices for op in dispatch.OPS],
    }


def _versions() -> dict[str, Any]:
    triton = error_text = None
    interpreted = False
    try:
        module = importlib.import_module("triton")
        triton, interpreted = module.__version__, module.knobs.runtime.interpret
    except Exception as error:  # whatever stops the import is what the user wants to read
        error_text = f"{type(error).__name__}: {error}"
    return {
        "fusedformer": fusedformer.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "triton": triton,
        "triton_error": error_text,
        "triton_interpreted": interpreted,
        "os": platform.platform(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _native(backend: str) -> dict[str, str | None]:
    """The library of a native backend, or why there is none. That of the CPU is built for this."""
    module = dispatch.load(backend, "attention")
    return {"library": None, "error": "it cannot be imported"} if module is None else module.about()


def _transformers() -> dict[str, str | None]:
    """Hugging Face transformers, which is not imported for this."""
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return {"version": None, "sliding_window": None}
    return {"version": version, "sliding_window": "as a mask"}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _devices() -> list[dict[str, Any]]:
    """The CPU, then every GPU; capability is what decides which kernels a device can run."""
    devices = [
        {
            "name": "cpu",
            "model": _cpu_model(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "name": f"cuda:{index}",
                    "model": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_bytes": properties.total_memory,
                }
            )
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "model": "Apple GPU", "capability": None})
    return devices


def _op(op: str, device: str) -> dict[str, Any]:
    reasons = dispatch.available_backends(op, device)
    order = dispatch.PREFERENCE.get(torch.device(device).type, ("reference",))
    return {
        "op": op,
        "device": device,
        # A call may still fall to the next backend for its shapes or dtypes.
        "automatic": next((name for name in order if reasons[name] is None), None),
        "backends": {
            name: {
                "runs": reason is None,
                "reason": reason,
                "import_error": dispatch.failure(name, op),
            }
            for name, reason in reasons.items()
        },
    }


def _wrapped(line: str, margin: str) -> list[str]:
    return textwrap.wrap(line, 96, initial_indent=margin, subsequent_indent=margin + "  ")


def text(report: dict[str, Any]) -> str:
    """The report as a person reads it; ops that fare alike share their lines."""
    versions = report["versions"]
    built_for = f"CUDA {versions['torch_cuda']}" if versions["torch_cuda"] else "CPU only"
    if versions["torch_hip"]:
        built_for = f"ROCm {versions['torch_hip']}"
    triton = versions["triton"] or f"none ({versions['triton_error']})"
    if versions["triton_interpreted"]:
        triton += ", in its interpreter (TRITON_INTERPRET is set): slow, for tests"
    lines = [
        f"fusedformer {versions['fusedformer']}",
        f"python      {versions['python']} on {versions['machine']}",
        f"torch       {versions['torch']} ({built_for})",
        f"triton      {triton}",
        *_wrapped(f"native      {_native_text(report['native'])}", ""),
        *_wrapped(f"cuda        {_cuda_text(report['cuda'])}", ""),
    ]
    transformers = report["transformers"]
    if transformers["version"]:
        window = f"attention with a sliding window runs {transformers['sliding_window']}"
        lines += _wrapped(f"hf          transformers {transformers['version']}; {window}", "")
    for device in report["devices"]:
        lines += ["", f"{device['name']}: {device['model']} ({device['capability']})"]
        alike: dict[tuple[str, ...], list[str]] = {}
        for row in report["ops"]:
            if row["device"] == device["name"]:
                alike.setdefault(tuple(_verdicts(row)), []).append(row["op"])
        for verdicts, ops in alike.items():
            lines += _wrapped(", ".join(ops), "  ")
            lines += [line for verdict in verdicts for line in _wrapped(verdict, "      ")]
    for (backend, _), (ops, error) in _failed_imports(report).items():
        lines += ["", *_wrapped(f"import of {backend} failed, for {', '.join(ops)}:", ""), error]
    return "\n".join(lines)


def _failed_imports(report: dict[str, Any]) -> dict[tuple[str, str], tuple[list[str], str]]:
    """By backend and last line: the ops that fail so, each once, and the first one's traceback."""
    found: dict[tuple[str, str], tuple[list[str], str]] = {}
    # That Triton is not installed stands in the line of its version already.
    absent = "triton" if "NotFound" in (report["versions"]["triton_error"] or "") else None
    for row in report["ops"]:
        for name, backend in row["backends"].items():
            error = (backend["import_error"] or "").rstrip()
            last = error.rpartition("\n")[2]
            if error and name != absent:
                ops, _ = found.setdefault((name, last), ([], error))
                if row["op"] not in ops:
                    ops.append(row["op"])
    return found


def _native_text(native: dict[str, str | None]) -> str:
    if native["library"] is None:
        return f"none ({native['error']})"
    return f"{native['instruction_set']}, by {native['compiler']}: {native['library']}"


def _cuda_text(cuda: dict[str, str | None]) -> str:
    if cuda["library"] is not None:
        return f"for {cuda['gpus']}: {cuda['library']}"
    if cuda["error"] is not None:
        return f"none ({cuda['error']})"
    return f"not built; `fusedformer build cuda` does it, by {cuda['compiler']}"


def _verdicts(row: dict[str, Any]) -> list[str]:
    """One line for each backend of an op on a device, the automatic choice first."""
    verdicts = [f"runs on {row['automatic']}"]
    for name, backend in row["backends"].items():
        if backend["reason"]:
            verdicts.append(f"not on {name}: {backend['reason']}")
        elif name != row["automatic"]:
            verdicts.append(f"also on {name}")
    return verdicts
