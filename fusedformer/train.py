"""``fusedformer train``: a model from data, in one command.

Everything that can be set is a field of a dataclass (transformer/presets.py and the model's own
configuration); a preset is a choice of values, and ``--set`` changes some.
"""

import argparse

from fusedformer.transformer import presets
from fusedformer.transformer.train import train
from fusedformer.transformer.train_parallel import World

_ABOUT = {
    "seq2seq": "an encoder-decoder Transformer on pairs of sentences: translation",
    "gpt": "a GPT on text: the next token",
    "bert": "a BERT on text: masked tokens",
    "vit": "a ViT on images: their classes",
    "bert-classifier": "a BERT on labelled texts: their classes",
}
_DATA = {
    "seq2seq": "a TSV file: source, tab, target",
    "gpt": "a text file or a folder of *.txt",
    "bert": "a text file or a folder of *.txt",
    "vit": "a folder with a folder of images for each class",
    "bert-classifier": "a TSV file: class, tab, text",
}


def configure(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", required=True)
    for task, about in _ABOUT.items():
        own = tasks.add_parser(
            task,
            help=about,
            description=f"Train {about}.",
            epilog=_fields(task),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        own.add_argument("--out", required=True, metavar="DIR", help="a new folder for all output")
        named = ", ".join(presets.PRESETS[task])
        own.add_argument("--preset", help=f"one of {named}; default: small, for a CPU")
        own.add_argument(
            "--data",
            help=f"{_DATA[task]}; or a name of `fusedformer data list`; default: the preset's",
        )
        own.add_argument("--held-out", help="the like, to measure on; default: a part of --data")
        own.set_defaults(start=None)
        if task == "bert-classifier":
            own.add_argument(
                "--start",
                metavar="CHECKPOINT",
                help="begin with a BERT that `train bert` made: its weights, sizes and tokenizer",
            )
        own.add_argument(
            "--set",
            nargs="+",
            action="extend",
            default=[],
            metavar="FIELD=VALUE",
            help="change fields of the preset; they are listed below",
        )
        own.add_argument(
            "--resume", action="store_true", help="go on with the run in DIR, exactly"
        )
        own.add_argument(
            "--parallel",
            choices=("ddp", "fsdp"),
            default="ddp",
            help="what the processes of `torchrun -m fusedformer train ...` share the work by",
        )


def run(args: argparse.Namespace) -> int:
    found = train(
        args.task,
        out=args.out,
        preset=args.preset,
        data=args.data,
        held_out=args.held_out,
        start=args.start,
        resume=args.resume,
        parallel=args.parallel,
        **presets.parse(args.task, args.set),
    )
    if World().rank == 0:
        for name, value in found.items():
            print(f"{name:40}{value:8.3f}")
    return 0


def _fields(task: str) -> str:
    """Every field with its default, for --help."""
    lines = ["fields (presets have their own defaults):"]
    for name, field in presets.fields(task).items():
        about = field.metadata.get("about", "of the model")
        lines.append(f"  {name:22} {field.default!s:12} {about}")
    return "\n".join(lines)
