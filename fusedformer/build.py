"""``fusedformer build``: compiles the C++ kernels ahead of their first use.

For an image, a cluster's shared home, or a machine that will have no compiler when it runs.
"""

import argparse
import shutil
from pathlib import Path

from fusedformer.kernels import native_build


def configure(parser: argparse.ArgumentParser) -> None:
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
    try:
        # Asked for by name, so what failed before is tried again.
        library = native_build.build(again=args.again, retry=True)
    except native_build.BuildError as error:
        raise OSError(str(error)) from error
    if args.into is not None:
        library = Path(shutil.copy(library, args.into / native_build.prebuilt_name()))
    print(library)
    return 0
