"""What becomes of result files: compared, drawn, put into the README; and --base."""

import json
import random
import re

import pytest
from bench_pools import row

from fusedformer import cli
from fusedformer.benchmarks import (
    base,
    bench_charts,
    bench_page,
    compare,
    document,
    readme,
    workers,
)

CEILINGS = {"copy_gbps": 50.0, "matmul_tflops": {"fp32": 0.5, "fp16": None}, "call_us": 2.0}
ENVIRONMENT = {
    "device": "cpu", "device_name": "A <chip>", "threads": 2, "torch": "2.13", "load": 0.1,
    "logical_cores": 2, "commit": None,
}  # fmt: skip


def result(rows, **environment):
    return {
        "schema_version": document.SCHEMA_VERSION, "kind": "bench", "state": "complete",
        "created": "2026-01-02T03:04:05+00:00", "seconds": 1.0, "options": {"suite": "cpu"},
        "environment": ENVIRONMENT | environment, "ceilings": CEILINGS, "rows": rows,
    }  # fmt: skip


def written(path, rows, **environment):
    path.write_text(json.dumps(result(rows, **environment)))
    return str(path)


def noisy(factor, count=20, seed=0):
    draws = random.Random(seed)
    return [factor * draws.lognormvariate(0, 0.03) for _ in range(count)]


# --- compare --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.0, compare.SAME), (1.02, compare.SAME), (1.3, compare.SLOWER), (0.7, compare.FASTER)],
)
def test_verdicts(factor, verdict):
    before, after = [row("fused", noisy(1.0))], [row("fused", noisy(factor, seed=1))]
    (change,) = compare.changes(before, after, 0.05, ("fused",))
    assert change.verdict == verdict
    assert change.low <= change.ratio <= change.high
    assert change.ratio == pytest.approx(factor, rel=0.05)


def test_noise_alone_is_no_change():
    """One slow sample of three moves a median's range past any threshold, and nothing is said."""
    before = [row("fused", [1.0, 1.0, 3.0])]
    (change,) = compare.changes(before, [row("fused", [1.0, 2.0, 3.0])], 0.05, ("fused",))
    assert change.verdict == compare.SAME


def test_bootstrap_covers_the_truth():
    """Of 95% ranges of the ratio of equal things, about one in twenty does not hold 1."""
    missed = 0
    for seed in range(100):
        _, low, high = compare.bootstrap(
            noisy(1.0, seed=seed), noisy(1.0, seed=1000 + seed), random.Random(seed)
        )
        missed += not low <= 1 <= high
    assert missed <= 12


@pytest.mark.parametrize(("factor", "code"), [(1.3, 1), (1.0, 0), (0.7, 0)])
def test_command(factor, code, tmp_path, capsys):
    a = written(tmp_path / "a.json", [row("fused", noisy(1.0)), row("sdpa", noisy(1.0))])
    b = written(tmp_path / "b.json", [row("fused", noisy(factor)), row("sdpa", noisy(9.0))])
    assert cli.main(["bench", "compare", a, b]) == code
    said = capsys.readouterr().out
    assert "B over A" in said
    assert "sdpa" not in said
    assert cli.main(["bench", "compare", a, b, "--threshold", "50"]) == 0
    assert cli.main(["bench", "compare", a, b, "--only", "sdpa"]) == 1


def test_what_no_longer_runs_is_worse(tmp_path, capsys):
    a = written(tmp_path / "a.json", [row("fused", noisy(1.0))])
    b = written(tmp_path / "b.json", [row("fused", status="failed", reason="x")], torch="2.14")
    assert cli.main(["bench", "compare", a, b]) == 1
    said = capsys.readouterr().out
    assert "fused: failed" in said
    assert "Not comparable: torch is '2.13' and '2.14'." in said


def test_files_that_have_nothing_in_common(tmp_path, capsys):
    a = written(tmp_path / "a.json", [row("fused", [1.0])])
    b = written(tmp_path / "b.json", [row("fused", [1.0], key="other")])
    assert cli.main(["bench", "compare", a, b]) == cli.USER_ERROR
    assert "no row of fused in common" in capsys.readouterr().err


# --- README ---------------------------------------------------------------------------------------


def test_readme_tables_are_made_from_results(tmp_path, monkeypatch, capsys):
    goal = {"kind": "ratio", "at_least": 4.0, "aim": 5.0}
    error = {"forward": 2.2e-3, "backward": None, "case": {}, "limit": {}}
    ours = row("fused", [1.0] * 3, goals=[goal], error=error)
    written(tmp_path / "a-cpu.json", [ours, row("sdpa", [4.5] * 3)])
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    file = tmp_path / "README.md"
    file.write_text("Before.\n<!-- bench: a-cpu -->\nold\n<!-- end of bench -->\nAfter.\n")
    assert cli.main(["bench", "readme", f"--file={file}", "--check"]) == 1
    assert cli.main(["bench", "readme", f"--file={file}"]) == 0
    text = file.read_text()
    assert "| t | 4.5 ms (sdpa) | 1 ms | 4.5x | — | 2e-03 |" in text
    assert "old" not in text
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "benchmarks/results/a-cpu.json" in text
    assert cli.main(["bench", "readme", f"--file={file}", "--check"]) == 0
    file.write_text(text.replace("4.5x", "5.5x"))
    assert cli.main(["bench", "readme", f"--file={file}", "--check"]) == 1
    capsys.readouterr()


def test_the_exponents_of_a_profile_are_made_into_a_table():
    def law(impl, label, quantity, p, exponent, **more):
        fitted = {"exponent": exponent, "low": exponent - 0.1, "high": exponent + 0.1}
        held = {"sweep": "seq", "impl": impl, "label": label, "causal": False, "dropout_p": p}
        return held | {"quantity": quantity, "fitted": True} | fitted | more

    fits = [
        law("fused", "fused (cpu)", "training_bytes", 0.0, 1.0),
        law("fused", "fused (cpu)", "training_bytes", 0.1, 1.25),
        law("fused", "fused (cpu)", "forward_ms", 0.0, 2.0),
        law("fused", "fused (cpu)", "forward_ms", 0.1, 2.5, fitted=False),
        law("fused", "fused (cpu)", "forward_ms", 0.0, 9.0, causal=True),
        law("fused", "fused (cpu)", "forward_ms", 0.0, 9.0, sweep="head_dim"),
        law("fused", "fused (cpu)", "backward_ms", 0.0, 9.0),
        law("sdpa", "torch SDPA (flash)", "training_bytes", 0.0, 1.0),
        law("sdpa", "torch SDPA (math)", "training_bytes", 0.1, 2.0),
    ]
    environment = {"device": "cpu", "device_name": "a CPU", "threads": 2, "torch": "2.13"}
    options = {"dropout": [0.0, 0.1], "dtype": "fp32", "batch": 1, "heads": 8, "head_dim": 64}
    data = {
        "kind": "profile attention", "created": "2026-01-02T03", "environment": environment,
        "options": options, "fits": fits, "text": None,
    }  # fmt: skip
    lines = readme.markdown(data, "profile-cpu").splitlines()
    assert "a CPU, 2 threads" in lines[0]
    assert lines[0].endswith("; 2026-01-02, `benchmarks/results/profile-cpu.json`.")
    assert lines[2:] == [
        "| full attention | memory, no dropout | memory, dropout 0.1 | time, no dropout "
        "| time, dropout 0.1 |",
        "|---|---|---|---|---|",
        "| fused (cpu) | N^1.00 (0.90 to 1.10) | N^1.25 (1.15 to 1.35) | N^2.00 (1.90 to 2.10) "
        "| not fitted |",
        "| torch SDPA (flash); torch SDPA (math) | N^1.00 (0.90 to 1.10) | N^2.00 (1.90 to 2.10) "
        "| not fitted | not fitted |",
    ]


def test_the_readme_agrees_with_the_result_files(capsys):
    assert cli.main(["bench", "readme", "--check"]) == 0


def test_result_files_can_be_read():
    for path in readme.RESULTS.glob("*.json"):
        data = document.read(path)
        assert data["state"] == document.COMPLETE, path.name
        assert data["environment"]["commit"], path.name


# --- Page and charts ------------------------------------------------------------------------------


def sweep():
    for impl, power in (("fused", 1), ("sdpa", 2)):
        for seq in (128, 256, 512, 1024):
            held = row(impl, [1e-3 * seq**power] * 3)
            yield held | {"case": held["case"] | {"seq": seq}, "key": f"k{seq}"}


def test_page_is_self_contained():
    rows = [*sweep(), row("plain", status="failed", reason="<script>")]
    html = bench_page.html(result(rows))
    assert not re.search(r"<script|<link[^>]+href=\"(?!data:)|src=|url\((?!#)|@import", html)
    assert not re.search(r"https?://(?!www\.w3\.org/)", html)  # XML namespaces are only names
    assert "prefers-color-scheme" in html
    assert "A &lt;chip&gt;" in html
    assert "failed: &lt;script&gt;" in html
    if "<svg" in html:
        ids = re.findall(r'\bid="([^"]+)"', html)
        assert len(ids) == len(set(ids))


def test_charts_fit_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    data = result(list(sweep()))
    (group,) = [
        series
        for key, series in bench_charts.groups(data).items()
        if dict(key[-1])["batch"] == 1
    ]
    slopes = {impl: series.slope().exponent for impl, series in group.items()}
    assert slopes == pytest.approx({"fused": 1.0, "sdpa": 2.0})
    titles = [chart.title for chart in bench_charts.everything(data)]
    assert len(titles) == 1 + 1 + 1
    assert bench_charts.png(data, "heading", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not bench_charts.png(result([]), "heading", tmp_path / "b.png")


# --- Another commit -------------------------------------------------------------------------------


def test_a_base_that_is_no_commit(capsys, tmp_path):
    argv = ["bench", "--device=cpu", "--base=nosuchcommit", f"--out={tmp_path}"]
    assert cli.main(argv) == cli.USER_ERROR
    assert "--base nosuchcommit" in capsys.readouterr().err


@pytest.mark.slow
def test_base_runs_the_other_commits_kernels():
    """In its own process: kernels of the worktree, benchmarks of this checkout."""
    if not (base.ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    where = "[__import__('fusedformer.' + name, fromlist=['x']).__file__ for name in {}]"
    names = ["kernels.dispatch", "benchmarks.measure"]
    with base.worktree("HEAD") as (folder, _), workers.Workers(False, root=folder) as pool:
        found = pool.run(eval, where.format(names)).value
        assert found[0] == str(folder / "kernels/dispatch.py")
        assert (folder / "benchmarks").resolve() == base.ROOT / "benchmarks"
        assert found[1].startswith(str(folder / "benchmarks"))
    assert not folder.exists()
