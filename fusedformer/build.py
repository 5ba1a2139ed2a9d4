"""``fusedformer build``: compiles the C++ kernels ahead of their first use.

For an image, a cluster's shared home, or a machine that will have no compiler when it runs.
"""

import argparse

from fusedformer.kernels import native_build


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--again", action="store_true", help="compile even if the library is there already"
    )


def run(args: argparse.Namespace) -> int:
    try:
        # Asked for by name, so what failed before is tried again.
        print(native_build.build(again=args.again, retry=True))
    except native_build.BuildError as error:
        raise OSError(str(error)) from error
    return 0
