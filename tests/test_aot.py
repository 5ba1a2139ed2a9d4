"""fusedformer aot: what it derives from a launch, its budgets, that no kernel is forgotten."""

import ast
import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import recorded
import triton.language as tl
from recorded import triton_signature
from triton.runtime.jit import JITFunction

from fusedformer import aot, cli

ROOT = Path(__file__).resolve().parent.parent
QUICK = [name for name, case in aot.CASES.items() if case.quick]


@pytest.fixture(scope="module")
def worker():
    """Runs a function of ``recorded`` where Triton does not interpret."""
    with aot.worker_pool(1) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


# --- What a launch compiles -----------------------------------------------------------------------


def _kernel(x_ptr, n, wide: tl.int64, fixed, annotated: tl.int64, scale, flag, BLOCK: tl.constexpr):
    pass


KERNEL = JITFunction(_kernel, do_not_specialize=["fixed", "annotated"])
ARGUMENTS = {
    "x_ptr": torch.empty(32, dtype=torch.bfloat16),
    "n": 17, "wide": 17, "fixed": 17, "annotated": 17, "scale": 0.5, "flag": True, "BLOCK": 64,
}  # fmt: skip
TYPES = {
    "x_ptr": "*bf16", "n": "i32", "wide": "i64", "fixed": "i32", "annotated": "i64",
    "scale": "fp32", "flag": "u1", "BLOCK": "constexpr",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "kind", "constant", "divisible"),
    [
        ("n", 17, "i32", False, False),
        ("n", -16, "i32", False, True),
        ("n", 0, "i32", False, True),
        ("n", 1, "constexpr", True, False),
        ("n", None, "constexpr", True, False),
        ("n", True, "u1", False, False),
        ("n", 1.0, "fp32", False, False),
        ("n", 2**31 - 1, "i32", False, False),
        ("n", 2**31, "i64", False, True),
        ("n", -(2**31) - 1, "i64", False, False),
        ("wide", 1, "i64", False, False),
        ("wide", 32, "i64", False, True),
        ("fixed", 1, "i32", False, False),
        ("fixed", 32, "i32", False, False),
        ("fixed", 2**40, "i64", False, False),
        ("fixed", None, "constexpr", True, False),
        ("annotated", 1, "i64", False, False),
        ("annotated", 32, "i64", False, False),
        ("scale", 1.0, "fp32", False, False),
        ("scale", None, "constexpr", True, False),
        ("x_ptr", None, "constexpr", True, None),
        ("x_ptr", torch.empty(16, dtype=torch.bool), "*u1", False, None),
        ("x_ptr", torch.empty((), dtype=torch.int64), "*i64", False, None),
        ("x_ptr", torch.empty(16, dtype=torch.float64, device="meta"), "*fp64", False, None),
        ("BLOCK", 1, "constexpr", True, False),
    ],
)
def test_signature(name, value, kind, constant, divisible):
    """One argument at a time: as expected here, and as Triton's own launch has it."""
    given = ARGUMENTS | {name: value}
    *args, block = given.values()
    types, constants, attributes = aot.signature(KERNEL, tuple(args), {"BLOCK": block})
    assert types == TYPES | {name: kind}
    assert constants == {"BLOCK": block} | ({name: value} if constant else {})
    position = list(TYPES).index(name)
    pointer = given["x_ptr"] is not None
    expected = ({0} if pointer else set()) | ({position} if divisible else set())
    assert attributes == {(index,): [["tt.divisibility", 16]] for index in expected}
    derived = triton_signature(KERNEL, tuple(args), {"BLOCK": block}, {})
    assert (types, constants, attributes) == derived


def test_signatures_are_those_of_triton(worker):
    count, unlike = worker(recorded.unlike_triton, list(aot.CASES), 90)
    assert unlike == []
    assert count > len(aot.CASES)


LENGTHS = [(length, batch) for length in (64, 65, 1000, 4096, 4097) for batch in (1, 2, 16)]
ROWS = (1, 2, 37, 5000)


def _groups(variants: dict) -> list[set]:
    """Sizes that have the same kernels compiled, together."""
    groups: dict = {}
    for size, compiled in variants.items():
        groups.setdefault(tuple(sorted(compiled)), set()).add(size)
    return sorted(groups.values(), key=min)


@pytest.mark.parametrize("capability", aot.SHARED_LIMIT)
@pytest.mark.parametrize("flags", ["none", "causal"])
def test_attention_is_compiled_once_for_all_lengths(worker, flags, capability):
    sizes = [(*size, 64, flags) for size in LENGTHS]
    assert len(_groups(worker(recorded.by_size, "attention", sizes, capability))) == 1


def _alignment(stride: int) -> bool:
    return stride % 16 == 0


# Triton compiles for strides that are multiples of 16 and for others. At a head dimension that is
# such a multiple itself, only a mask has strides that depend on the length.
@pytest.mark.parametrize(
    ("flags", "dim", "strides"),
    [
        # of batches; that of a single one is not used, and taken as 0
        ("mask", 64, lambda length, batch: (length if batch > 1 else 0,)),
        ("bias", 64, lambda length, batch: (length, length * length)),  # of rows and heads
        ("none", 72, lambda length, batch: (72 * length, 4 * 72 * length)),  # of heads, batches
    ],
)
def test_attention_is_compiled_by_alignment(worker, flags, dim, strides):
    expected: dict = {}
    for size in LENGTHS:
        key = tuple(_alignment(stride) for stride in strides(*size))
        expected.setdefault(key, set()).add((*size, dim, flags))
    sizes = [(*size, dim, flags) for size in LENGTHS]
    groups = _groups(worker(recorded.by_size, "attention", sizes))
    assert groups == sorted(expected.values(), key=min)


def test_attention_is_compiled_once_for_all_offsets(worker):
    sizes = [(offset,) for offset in (0, 1, 16, 17, 4096)]
    assert len(_groups(worker(recorded.by_size, "attention_offsets", sizes))) == 1


@pytest.mark.parametrize("width", [17, 1024, 1001, 20000, 50257])
@pytest.mark.parametrize("op", ["layer_norm", "dropout", "bias_activation", "cross_entropy"])
def test_rows_are_compiled_once_for_all_counts(worker, op, width):
    rows = ROWS
    if op in ("dropout", "bias_activation") and width > 256:
        rows = tuple(n for n in ROWS if n >= 8)  # fewer long rows are cut lengthwise (_tile)
    sizes = [(n, width) for n in rows]
    assert len(_groups(worker(recorded.by_size, op, sizes))) == 1


# --- No kernel is forgotten -----------------------------------------------------------------------


def _is_jit(node: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def _named(node: ast.expr) -> list[str]:
    """What a launch's first argument may be: a name, or one of two."""
    if isinstance(node, ast.IfExp):
        return _named(node.body) + _named(node.orelse)
    assert isinstance(node, ast.Name), f"launch(): name the kernel, got {ast.unparse(node)}"
    return [node.id]


def kernels_and_launched() -> tuple[set[str], set[str]]:
    """All functions of kernels/triton that are jitted, and those that are launched."""
    jitted, launched = set(), set()
    for path in sorted((ROOT / "kernels" / "triton").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and _is_jit(node):
                jitted.add(node.name)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "launch":
                launched.update(_named(node.args[0]))
    return jitted, launched


def test_every_kernel_is_a_quick_case(worker):
    """And so compiled by CI."""
    jitted, launched = kernels_and_launched()
    assert len(launched) >= 17
    assert launched <= jitted
    assert {name for name in jitted if name.endswith("_kernel")} == launched
    met = worker(recorded.kernels_of_cases, QUICK, 90)
    assert {kernel for kernels in met.values() for kernel in kernels} == launched


def test_case_names_tell_the_op():
    """faults() knows attention by its name; --only finds the rest so."""
    ops = {name.split("-")[0] for name in aot.CASES}
    assert ops == {
        "attention", "layer_norm", "dropout", "bias_activation", "cross_entropy",
        "linear_cross_entropy",
    }  # fmt: skip


# --- Budgets --------------------------------------------------------------------------------------


def _report(case="layer_norm-bf16-w64", capability=90, bits=16, options=None, **found):
    return aot.Report(case, "kernel", capability, bits, options or {}, **found)


ATTENTION = {"BLOCK_M": 64, "BLOCK_N": 32}


@pytest.mark.parametrize(
    ("report", "fault"),
    [
        (_report(stack=4), "4 bytes of stack a thread, over 0"),
        (_report(stack=4, capability=80), "4 bytes of stack a thread, over 0"),
        (_report(stack=65, capability=100), "65 bytes of stack a thread, over 64"),
        (_report(stack=769, bits=32), "769 bytes of stack a thread, over 768"),
        (_report(shared=232449), "232449 bytes of shared memory, over 232448"),
        (_report(shared=166913, capability=80), "166913 bytes of shared memory, over 166912"),
        (_report(shared=101377, capability=89), "101377 bytes of shared memory, over 101376"),
        (_report(shared=101377, capability=120), "101377 bytes of shared memory, over 101376"),
        (_report("attention-bf16", options=ATTENTION, matrix="mma"), "uses mma, not wgmma"),
        (_report("attention-fp16", options=ATTENTION), "uses -, not wgmma"),
        (_report(bits=32, rounded=2), "rounds the float32 of 2 products to TF32"),
    ],
)
def test_fault(report, fault):
    assert aot.faults(report) == [fault]


@pytest.mark.parametrize(
    "report",
    [
        _report(registers=255),
        _report(stack=64, capability=89),
        _report(stack=768, bits=32),
        _report(stack=768, bits=32, capability=80),
        _report(shared=232448),
        _report(shared=232448, capability=100),
        _report("attention-bf16", options=ATTENTION, matrix="wgmma"),
        _report("attention-bf16", options=ATTENTION, matrix="mma", capability=80),
        _report("attention-bf16", options=ATTENTION, matrix="tcgen05", capability=100),
        _report("attention-bf16", options=ATTENTION | {"BLOCK_M": 32}, matrix="mma"),
        _report("attention-fp32", options=ATTENTION, matrix="mma", bits=32),
        _report("attention-bf16", options={"BLOCK_M": 64}),  # no product: a sum over rows
    ],
)
def test_no_fault(report):
    assert aot.faults(report) == []


def test_every_broken_budget_is_told():
    report = _report("attention-bf16", options=ATTENTION, stack=8, shared=10**6, matrix="mma")
    assert len(aot.faults(report)) == 3


# --- The command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arch", "90", "75"], "--arch takes 80, 89, 90, 100, 120; got 75"),
        (["--only", "no-such"], "--only: no case's name holds 'no-such'"),
        (["--only", "fp16", "--quick"], "--only: no quick case's name holds 'fp16'"),
        (["--jobs", "0"], "--jobs must be 1 or more; got 0"),
    ],
)
def test_user_errors(argv, message, capsys):
    assert cli.main(["aot", *argv]) == cli.USER_ERROR
    assert capsys.readouterr().err == f"fusedformer aot: {message}\n"


def test_list(capsys):
    assert cli.main(["aot", "--list", "--quick"]) == 0
    assert capsys.readouterr().out.split() == QUICK


@pytest.fixture
def compiled(monkeypatch):
    """Lets the command find these reports, or raises what is among them, and runs it."""

    def run(*outcomes, argv=()):
        def compile_all(tasks, jobs):
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
                yield [outcome]

        monkeypatch.setattr(aot, "compile_all", compile_all)
        return cli.main(["aot", *argv])

    return run


def test_within_budget(compiled, capsys):
    assert compiled(_report(registers=40, stack=0), _report(registers=90, shared=512)) == 0
    out = capsys.readouterr().out
    assert out.endswith("2 kernels compiled, 0 over budget\n")
    table = out[out.index("\nkernel ") :].split("\n\n")[0].split("\n")[1:]
    assert [line.split() for line in table[1:]] == [["kernel", "2", "90", "0", "512", "0", "-"]]


def test_over_budget(compiled, capsys):
    assert compiled(_report(), _report(stack=8, faults=["8 bytes"])) == 1
    out = capsys.readouterr().out
    assert "layer_norm-bf16-w64  FAULT: 8 bytes\n" in out
    assert out.endswith("2 kernels compiled, 1 over budget\n")


def test_interrupt_keeps_what_was_compiled(compiled, capsys, tmp_path):
    path = tmp_path / "reports.json"
    code = compiled(_report(registers=7), KeyboardInterrupt(), argv=["--json", str(path)])
    assert code == cli.INTERRUPTED
    (report,) = json.loads(path.read_text())
    assert report["registers"] == 7
    assert report["kernel"] == "kernel"


def test_unwritable_json_shows_before_the_work(compiled, capsys, tmp_path):
    argv = ["--json", str(tmp_path / "no" / "such")]
    assert compiled(AssertionError("compiled first"), argv=argv) == cli.USER_ERROR


def test_a_kernel_that_fails_is_a_fault_and_no_stop(monkeypatch):
    """One does not compile, one is not launched, one crashes its process; the next still runs."""
    monkeypatch.setattr(aot, "_start_worker", recorded.start_worker_with_failures)
    for name in recorded.FAILURES:
        monkeypatch.setitem(aot.CASES, name, aot.aot_cases.Case(16, False, lambda: None))
    tasks = [(name, 90) for name in (*recorded.FAILURES, "dropout-bf16-4096x1024")]
    groups = list(aot.compile_all(tasks, jobs=1))
    assert [len(group) for group in groups] == [1, 1, 1, 1]
    wrong, unlaunched, crash, last = (group[0] for group in groups)
    assert wrong.kernel == "wrong_kernel"
    assert wrong.faults[0].startswith("does not compile: ")
    assert unlaunched.faults == ["cannot be launched: ZeroDivisionError: division by zero"]
    assert crash.faults == ["the compiler crashed"]
    assert (last.faults, last.registers > 0) == ([], True)


# --- The compiler ---------------------------------------------------------------------------------

# Under pytest-xdist, its workers already share the cores.
JOBS = 1 if "PYTEST_XDIST_WORKER" in os.environ else os.cpu_count() or 1


def _compiled(names: list[str], capability: int) -> list[aot.Report]:
    return [
        report
        for group in aot.compile_all([(name, capability) for name in names], JOBS)
        for report in group
    ]


def _faults(reports: list[aot.Report]) -> list[str]:
    return [f"{r.case}: {r.kernel}: {fault}" for r in reports for fault in r.faults]


def _part(name: str) -> str:
    """The op, and for attention the dtype: what one test compiles."""
    op, dtype, *_ = name.split("-")
    return f"{op}-{dtype}" if op == "attention" else op


@pytest.mark.slow
@pytest.mark.parametrize("part", sorted({_part(name) for name in QUICK}))
def test_within_budget_on_sm_90(part):
    reports = _compiled([name for name in QUICK if _part(name) == part], 90)
    assert _faults(reports) == []
    assert all(report.registers > 0 for report in reports)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [c for c in aot.SHARED_LIMIT if c != 90])
def test_within_budget_elsewhere(worker, capability):
    """One configuration of each kernel, in bfloat16."""
    names = [name for name in QUICK if "-bf16-" in name]
    launched = worker(recorded.kernels_of_cases, names, capability)
    chosen, met = [], set()
    for name, kernels in sorted(launched.items(), key=lambda item: -len(set(item[1]))):
        if not met.issuperset(kernels):
            chosen.append(name)
            met.update(kernels)
    assert met == kernels_and_launched()[1]
    assert _faults(_compiled(chosen, capability)) == []
