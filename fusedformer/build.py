"""``fusedformer build``: compiles the native kernels ahead of their first use.

For an image, a cluster's shared home, or a machine that will have no compiler when it runs. The
CUDA kernels need nvcc and no GPU.
"""

import argparse
import shutil
import sys
from pathlib import Path
from types import ModuleType

import torch

from fusedformer.kernels import native_build, native_build_cuda
from fusedformer.kernels.native_cache import BuildError

BUILDERS: dict[str, ModuleType] = {"cpu": native_build, "cuda": native_build_cuda}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "library",
        nargs="?",
        choices=tuple(BUILDERS),
        help=f"cpu, or cuda: for {native_build_cuda.GPUS}; by default cpu, and both beside such a "
        "GPU",
    )
    parser.add_argument(
        "--again", action="store_true", help="compile even if the library is there already"
    )
    parser.add_argument(
        "--into",
        type=Path,
        metavar="FOLDER",
        help="copy the library there; from a checkout's csrc, `pip wheel .` takes it along",
    )


def run(args: argparse.Namespace) -> int:
    if args.library:
        _build(args.library, args)
        return 0
    _build("cpu", args)
    if _has_gpu():
        try:
            _build("cuda", args)
        except OSError as error:  # nobody asked for it; Triton has the GPU
            print(f"fusedformer build: no CUDA kernels: {error}", file=sys.stderr)
    return 0


def _build(name: str, args: argparse.Namespace) -> None:
    """Builds one library and prints where it is."""
    builder = BUILDERS[name]
    try:
        # Asked for by name, so what failed before is tried again.
        library = builder.build(again=args.again, retry=True)
    except BuildError as error:
        raise OSError(str(error)) from error
    if args.into is not None:
        library = Path(shutil.copy(library, args.into / builder.prebuilt_name()))
    print(library)


def _has_gpu() -> bool:
    """Whether there is a GPU that the CUDA kernels are for."""
    if not torch.cuda.is_available():
        return False
    found = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return native_build_cuda.CAPABILITY in found
