"""The ``fusedformer`` command: finds the module of a subcommand and runs it.

Such a module has ``configure(parser)``, which adds its arguments, and ``run(args) -> int``, which
returns the exit code. It is imported only when its subcommand is called.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import fusedformer

# subcommand -> its module, and what --help says of it
COMMANDS = {
    "aot": ("fusedformer.aot", "compile every GPU kernel without a GPU, and hold it to budgets"),
    "attention-map": ("fusedformer.use.attention_map", "draw which word a model looks at"),
    "bench": ("fusedformer.benchmarks.bench", "time the ops beside those of PyTorch and others"),
    "build": ("fusedformer.build", "compile the C++ and CUDA kernels ahead of their first use"),
    "classify": ("fusedformer.use.classify", "say which class an image or a text is of"),
    "data": ("fusedformer.data", "list and fetch the data sets that training knows"),
    "doctor": ("fusedformer.doctor", "say what each op runs on here, and why not on the rest"),
    "generate": ("fusedformer.use.generate", "continue a text, or fill in its masked words"),
    "gpu": ("fusedformer.benchmarks.gpu", "collect what only a GPU can show, in one file"),
    "profile": ("fusedformer.benchmarks.profile", "measure how an op's cost grows with its sizes"),
    "score": ("fusedformer.use.score", "say how likely a model holds a text to be"),
    "train": ("fusedformer.train", "train a model: translation, text, masked words, classes"),
    "translate": ("fusedformer.use.translate", "translate sentences"),
}

USER_ERROR = 2  # as argparse has it
INTERRUPTED = 130  # as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: that of this process); returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    about = (fusedformer.__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="fusedformer", description=about)
    parser.add_argument(
        "--version", action="version", version=f"fusedformer {fusedformer.__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    module = None
    for name, (path, help_text) in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        if argv[:1] == [name]:
            module = importlib.import_module(path)
            module.configure(command)
    args = parser.parse_args(argv)
    if module is None:
        parser.error(f"the command comes first: fusedformer {args.command} ...")
    try:
        code = module.run(args)
        sys.stdout.flush()  # so that a closed pipe shows here, not at exit
        return code
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; nothing may be flushed into the pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        # A function and its command may have the same name; it is said once.
        text = str(error).removeprefix(f"{args.command}: ")
        print(f"fusedformer {args.command}: {text}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"fusedformer {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
