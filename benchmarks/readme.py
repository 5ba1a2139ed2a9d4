"""``fusedformer bench readme``: the README's tables, made from result files.

A table stands between two comments, `<!-- bench: NAME -->` and `<!-- end of bench -->`; NAME is a
result file of benchmarks/results/ without ".json". Whatever is between them is replaced.
"""

import argparse
import re
from pathlib import Path

from fusedformer.benchmarks import (
    bench_page,
    bench_tables,
    document,
    goals,
    metrics,
    profile_page,
    workers,
)
from fusedformer.benchmarks.entries import RATIO
from fusedformer.benchmarks.ops import common

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

_PART = re.compile(r"(<!-- bench: ([\w.-]+) -->\n).*?(<!-- end of bench -->)", re.DOTALL)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--file", default=str(ROOT / "README.md"), help="the file (README.md)")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")


def run(args: argparse.Namespace) -> int:
    """Writes the tables; with --check the exit code is 1 where that would change the file.

    Raises:
        ValueError: a table's result file is missing or is no bench result.
    """
    path = Path(args.file)
    if not path.is_file():
        raise ValueError(f"there is no {path}; run this in a checkout, or name a file by --file")
    before = path.read_text(encoding="utf-8")
    after = filled(before, RESULTS)
    if before == after:
        print(f"{path}: its tables are those of the result files.")
        return 0
    if args.check:
        print(f"{path}: its tables are not those of the result files (fusedformer bench readme).")
        return 1
    path.write_text(after, encoding="utf-8")
    print(f"{path}: written.")
    return 0


def filled(text: str, folder: Path) -> str:
    """A text with each of its tables made anew from the result files of a folder."""

    def part(match: re.Match) -> str:
        data = document.read(folder / f"{match[2]}.json")
        return f"{match[1]}{markdown(data, match[2])}\n{match[3]}"

    return _PART.sub(part, text)


def markdown(data: dict, name: str) -> str:
    """The table of a result.

    Of a bench: each entry's costs, their ratio with its range, and both errors. Of a profile: the
    exponents of full attention.
    """
    if data["kind"] == "profile attention":
        return _exponents(data, name)
    lines = [
        f"{bench_page.setting(data)}; {data['created'][:10]}, `benchmarks/results/{name}.json`.",
        "",
        "| | baseline | fusedformer | ratio (20 to 80%) | error: baseline | error: ours |",
        "|---|---|---|---|---|---|",
    ]
    for members in bench_tables.entries(data["rows"]).values():
        for ours in bench_tables.own(members):
            lines.append(f"| {' | '.join(_cells(ours, members, data))} |")
    return "\n".join(lines)


_QUANTITIES = {"training_bytes": "memory", "forward_ms": "time"}


def _exponents(data: dict, name: str) -> str:
    """A row for each implementation, a column for each quantity and dropout probability."""
    found: dict[str, dict[tuple[str, float], dict]] = {}
    for law in data["fits"]:
        if law["sweep"] == "seq" and not law["causal"] and law["quantity"] in _QUANTITIES:
            found.setdefault(law["impl"], {})[law["quantity"], law["dropout_p"]] = law
    columns = [(quantity, p) for quantity in _QUANTITIES for p in data["options"]["dropout"]]
    heads = [f"{_QUANTITIES[q]}, {f'dropout {p:g}' if p else 'no dropout'}" for q, p in columns]
    lines = [
        f"{profile_page.setting(data)}; {data['created'][:10]}, `benchmarks/results/{name}.json`.",
        "",
        f"| full attention | {' | '.join(heads)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for laws in found.values():
        ran = "; ".join(dict.fromkeys(law["label"] for law in laws.values()))
        lines.append(f"| {ran} | {' | '.join(_power(laws.get(key)) for key in columns)} |")
    return "\n".join(lines)


def _power(law: "dict | None") -> str:
    if law is None or not law["fitted"]:
        return "not fitted"
    return f"N^{law['exponent']:.2f} ({law['low']:.2f} to {law['high']:.2f})"


def _cells(ours: dict, members: dict[str, dict], data: dict) -> list[str]:
    base = members.get(ours["baseline"])
    ratio = metrics.ratio(ours, base) if base is not ours else None
    shown = bench_tables.speed(ratio)
    shown += "".join(
        f"; {goals.text(goal['kind'], goals.value(goal['kind'], ours, data))}"
        for goal in ours["goals"]
        if goal["kind"] != RATIO
    )
    ran = base["label"] if base and base["status"] == workers.OK else ours["baseline"]
    forced = common.forced_backend(ours["impl"])
    return [
        ours["title"],
        f"{bench_tables.cost(base)} ({ran})",
        bench_tables.cost(ours) + (f" ({forced})" if forced else ""),
        shown,
        _error(base),
        _error(ours),
    ]


def _error(row: "dict | None") -> str:
    found = (row or {}).get("error") or {}
    parts = [f"{found[p]:.0e}" for p in ("forward", "backward") if found.get(p) is not None]
    return ", ".join(parts) or "—"
