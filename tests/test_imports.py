"""Imports run one way, transformer -> nn -> kernels/<op> -> dispatch -> backend; short files."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fusedformer", "kernels", "transformer", "benchmarks", "tests", "tools", "examples")

# Which groups of modules a group may import; one that is not a key may import everything. dispatch
# loads backends by name, and the command line its subcommands, hence neither stands here.
ALLOWED = {
    "common": {"common"},
    "dispatch": {"common"},
    "reference": {"common", "reference"},
    "triton": {"common", "triton"},
    "builder": {"common", "builder"},
    "native": {"common", "builder", "native"},
    "cuda": {"common", "builder", "cuda"},
    "op": {"common", "dispatch", "op"},
    # The weights that MultiheadAttention returns beside its output are the reference's.
    "nn": {"common", "op", "nn", "reference"},
    "package": {"common", "dispatch", "op", "nn", "layers", "transformer", "package"},
    # Of the models' code, layers.py alone calls ops; the rest has them from it and from nn.
    "layers": {"common", "op", "nn", "layers"},
    "transformer": {"common", "nn", "layers", "transformer"},
}

MAX_LINES = 400
# Files that may be longer, with the reason.
LONG: dict[str, str] = {}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "fusedformer" else ("fusedformer", *parts)
    return ".".join(parts).removesuffix(".__init__")


def group(module: str) -> str:
    """The group of one of our modules, given as fusedformer.<...>."""
    parts = module.split(".")[1:]
    first, name = (*parts, "", "")[:2]
    if (first, name) == ("transformer", "layers"):
        return name
    if first != "kernels":
        # aot looks at what launchers would launch, so it has to know the Triton backend.
        first = "aot" if first.startswith("aot") else first
        # The command `build` is the one caller of the builder beside the backend.
        own = ("nn", "transformer", "benchmarks", "aot", "build")
        return first if first in own else "package"
    if name in ("dispatch", "reference", "triton", "native", "cuda"):
        return name
    if name.startswith("native_"):
        return "builder"
    return "common" if name in ("rng", "checks") else "op"


def imported(module: str, tree: ast.AST) -> Iterator[str]:
    """Every module that may be meant by an import statement, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            # "from fusedformer.kernels import rng" means a module, "... .rng import f" does not.
            folders = ("", ".kernels", ".kernels.triton", ".kernels.cuda")
            parent = base in [f"fusedformer{folder}" for folder in folders]
            yield from ([f"{base}.{alias.name}" for alias in node.names] if parent else [base])


def violations(module: str, source: str) -> list[str]:
    found = []
    for name in imported(module, ast.parse(source)):
        if name.split(".")[0] in ("kernels", "transformer", "benchmarks"):
            found.append(f"{module} imports top-level {name}")
        allowed = ALLOWED.get(group(module))
        if name.split(".")[0] == "fusedformer" and allowed and group(name) not in allowed:
            found.append(f"{module} imports {name}")
    return found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fusedformer.kernels.attention", "from fusedformer.kernels import reference"),
        ("fusedformer.kernels.attention", "def f():\n    import fusedformer.transformer.layers"),
        ("fusedformer.kernels.attention", "from fusedformer import benchmarks"),
        ("fusedformer.kernels.attention", "import fusedformer"),
        ("fusedformer.kernels.dispatch", "from .reference import attention_fwd"),
        ("fusedformer.kernels.dispatch", "from fusedformer.kernels.attention import attention"),
        ("fusedformer.kernels.reference", "from fusedformer.kernels.triton import launch"),
        ("fusedformer.kernels.triton.attention", "from fusedformer.kernels import reference"),
        ("fusedformer.kernels.triton.attention", "from ..dispatch import pick"),
        ("fusedformer.kernels.cuda.attention", "from fusedformer.kernels.triton import launch"),
        ("fusedformer.kernels.native_cache", "from fusedformer.kernels import native"),
        ("fusedformer.kernels.rng", "from fusedformer.kernels import dispatch"),
        ("fusedformer.transformer.layers", "from fusedformer.kernels.reference import f"),
        ("fusedformer.transformer.gpt", "from fusedformer.kernels.attention import attention"),
        ("fusedformer.transformer.gpt", "from fusedformer.kernels import dispatch, rng"),
        ("fusedformer.transformer.gpt", "from fusedformer import attention"),
        ("fusedformer.transformer.layers", "from fusedformer.transformer import gpt"),
        ("fusedformer.benchmarks.profile", "import kernels.attention"),
        ("fusedformer.doctor", "from transformer import layers"),
        ("fusedformer.kernels.attention", "from fusedformer import nn"),
        ("fusedformer.nn.attention", "from fusedformer.transformer.layers import Rotary"),
        ("fusedformer.nn.attention", "from fusedformer import attention"),
    ],
)
def test_rule_catches(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fusedformer.kernels.attention", "from fusedformer.kernels import dispatch, rng"),
        ("fusedformer.kernels.triton.attention", "from fusedformer.kernels.triton import launch"),
        ("fusedformer.kernels.triton.attention", "import triton\nfrom triton import language"),
        ("fusedformer.benchmarks.profile", "from fusedformer.kernels import reference"),
        ("fusedformer.transformer.layers", "from fusedformer.kernels.dropout import dropout"),
        ("fusedformer.transformer.gpt", "from fusedformer.transformer.layers import Rotary"),
    ],
)
def test_rule_allows(module, source):
    assert not violations(module, source)


def test_imports_run_one_way():
    files = python_files("fusedformer", "kernels", "transformer", "benchmarks")
    assert any(path.name == "dispatch.py" for path in files)
    assert [v for path in files for v in violations(module_name(path), path.read_text())] == []


def test_importing_fusedformer_is_cheap():
    """It brings no compiler; a kernel's own import does, where it is needed."""
    code = (
        "import sys, fusedformer; fusedformer.attention; "
        "print([name for name in ('triton', 'torch._dynamo', 'torch.distributed.tensor', "
        "'transformers', 'matplotlib', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def cpp_files() -> list[Path]:
    suffixes = (".h", ".cpp", ".cu", ".cuh")
    paths = (path for folder in ("csrc", "tests/hopper") for path in (ROOT / folder).rglob("*"))
    return sorted(path for path in paths if path.suffix in suffixes)


def test_lines_of_cpp_are_short():
    """ruff holds those of Python."""
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in cpp_files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100
    ]
    assert not long


def test_files_are_short():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in [*python_files(*FOLDERS), *cpp_files()]
    }
    over = {name for name, lines in lengths.items() if lines > MAX_LINES}
    assert over - LONG.keys() == set(), "over 400 lines: two ideas in one file"
    assert LONG.keys() - over == set(), "no longer over 400 lines: take it off the list"
