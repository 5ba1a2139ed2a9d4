"""The attention profile: fits, options, lengths of a text, rows for what cannot run, its files."""

import argparse
import json
import os
import re
import signal
import sys
import time

import pytest
import torch

from fusedformer import cli
from fusedformer.benchmarks import (
    fit,
    memory,
    options,
    page,
    points,
    profile,
    providers,
    results,
    sweep,
    tables,
    terminal,
    text_lengths,
    workers,
)
from fusedformer.benchmarks.providers import Case

TINY = ["--device", "cpu", "--seq", "16,32", "--heads", "2", "--head-dim", "8"]
TINY += ["--head-dim-sweep", "16", "--head-dim-seq", "16"]
PLAIN = ["--impl", "plain", "--dropout", "0", "--causal", "no"]


def parsed(*argv: str) -> options.Options:
    parser = argparse.ArgumentParser()
    options.add_options(parser)
    return options.parse(parser.parse_args(argv))


@pytest.fixture(scope="module", autouse=True)
def few_passes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "PASSES", 2)
        yield


def run(tmp_path, *argv: str) -> dict:
    assert cli.main(["profile", "attention", *TINY, "--out", str(tmp_path), *argv]) == 0
    return json.loads((tmp_path / "attention.json").read_text())


# --- Fits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("power", "scale"), [(2, 3e-6), (1, 0.5), (0.5, 7)])
def test_fit_of_exact_power_laws(power, scale):
    x = [256, 512, 1024, 2048, 4096]
    law = fit.power_law(x, [scale * n**power for n in x])
    assert f"{law.exponent:.2f}" == f"{power:.2f}"
    assert law.coefficient == pytest.approx(scale)
    assert law.high - law.low < 1e-6


def test_fit_range_by_hand():
    # log2 of y over log2 of x: 0, 1, 2, 4 over 0, 1, 2, 3. Slope 1.3, residual 0.3, 2 degrees of
    # freedom (t = 4.303), so half the range is 4.303 * sqrt(0.3 / 2 / 5).
    law = fit.power_law([1, 2, 4, 8], [1, 2, 4, 16])
    assert law.exponent == pytest.approx(1.3)
    assert law.high - 1.3 == pytest.approx(4.303 * (0.3 / 2 / 5) ** 0.5)
    assert law.low < 1.3 < law.high


def test_fit_covers_the_truth_of_noisy_data():
    generator = torch.Generator().manual_seed(0)
    x = [2**i for i in range(6, 14)]
    hits = 0
    for _ in range(200):
        noise = torch.exp(0.1 * torch.randn(len(x), generator=generator)).tolist()
        law = fit.power_law(x, [n**2 * e for n, e in zip(x, noise, strict=True)])
        hits += law.low <= 2 <= law.high
    assert 180 <= hits <= 198  # 95% of 200, within 3 standard errors


def test_fit_refuses_what_is_no_power_law():
    with pytest.raises(ValueError, match="3 or more"):
        fit.power_law([1, 2], [1, 2])
    with pytest.raises(ValueError, match="positive"):
        fit.power_law([1, 2, 3], [1, 0, 2])


def test_fit_uses_only_points_over_the_floor():
    series = [(n, n**2 / 1e5) for n in (64, 128, 256, 512, 1024, 2048, 4096)]
    found = fit.fit_series(series, 1.0, "1 ms")
    assert found["fitted"] is False
    assert found["used"] == [512, 1024, 2048, 4096]
    assert found["reason"] == "4 of 7 points over 1 ms; 5 are needed"
    found = fit.fit_series([*series, (8192, 8192**2 / 1e5)], 1.0, "1 ms")
    assert found["used"] == [512, 1024, 2048, 4096, 8192]
    assert round(found["exponent"], 2) == 2.00


# --- Options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--seq", "0"], "--seq got '0'; it wants whole numbers of at least 1, such as 32,64,128"),
        (["--seq", "64,many"], "--seq got '64,many'; it wants whole numbers"),
        (["--seq", "-8"], "--seq got '-8'; it wants whole numbers"),
        (["--heads", "1.5"], "--heads got '1.5'; it wants a whole number of at least 1"),
        (["--head-dim", "257"], "--head-dim got '257'; it wants a whole number from 1 to 256"),
        (["--batch", "none"], "--batch got 'none'; it wants a whole number of at least 1"),
        (["--dtype", "fp64"], "--dtype got 'fp64'; it wants one of fp32, fp16, bf16"),
        (["--impl", "fused,fast"], "--impl got 'fast'; it wants some of fused, sdpa, plain"),
        (["--dropout", "1"], "--dropout got '1'; it wants numbers from 0 to below 1"),
        (["--budget", "soon"], "--budget got 'soon'; it wants a number of seconds above 0"),
        (
            ["--text", "no-such.txt"],
            "--text no-such.txt cannot be read as UTF-8 text: No such file",
        ),
        (["--tokenizer", "t.json"], "--tokenizer counts the tokens of --text FILE"),
        (["--out", __file__], f"--out {__file__} cannot be a folder"),
    ],
)
def test_wrong_options_are_one_sentence(argv, said, capsys):
    # "=", since a value that begins with a dash looks like an option otherwise.
    argv = [f"{argv[0]}={argv[1]}"]
    assert cli.main(["profile", "attention", "--device", "cpu", *argv]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said():
    with pytest.raises(ValueError, match="--device got 'cuda'; there is no CUDA GPU"):
        parsed("--device", "cuda")


def test_plan_has_every_variant_shortest_first():
    plan = parsed("--device=cpu", "--seq=64,16", "--head-dim-sweep=8").plan()
    assert [(p.sweep, p.case.seq, p.case.head_dim) for p in plan[:2]] == [
        ("head_dim", 1024, 8),
        ("seq", 16, 64),
    ]
    variants = [(p.case.seq, p.case.causal, p.case.dropout_p) for p in plan[1:]]
    assert variants == [(n, c, p) for n in (16, 64) for c in (False, True) for p in (0, 0.1)]


@pytest.mark.parametrize("device", options.DEFAULTS)
def test_defaults_can_be_fitted(device):
    lengths = [int(n) for n in options.DEFAULTS[device]["seq"].split(",")]
    assert len(lengths) >= fit.MIN_POINTS + 2  # the shortest may take less than a millisecond


# --- Lengths of a text ----------------------------------------------------------------------------


def test_the_longest_bins_hold_a_tenth_at_most():
    bins = [{"count": count} for count in (60, 25, 6, 3, 2)]
    assert results.longest_bins(bins) == bins[3:]
    assert results.longest_bins([{"count": 4}, {"count": 96}]) == [{"count": 96}]


def test_text_paragraphs_in_bytes(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("  añb\n\ncd\nef\n \n\n" + "x" * 100 + "\n", encoding="utf-8")
    found = text_lengths.read(str(text))
    assert (found.unit, found.paragraphs, found.tokens) == ("UTF-8 bytes", 3, 4 + 5 + 100)
    assert sum(part.count for part in found.bins) == 3
    assert found.bins[-1].length == 100


def test_text_histogram_keeps_the_sum_of_squares():
    lengths = [3, 3, 9, 17, 30, 64, 65, 100, 400, 401]
    bins = text_lengths.histogram(lengths)
    assert sum(part.count for part in bins) == len(lengths)
    for part in bins:
        inside = [n for n in lengths if part.low <= n < part.high]
        assert part.count == len(inside)
        assert part.length**2 == pytest.approx(sum(n * n for n in inside) / part.count, rel=0.1)


@pytest.mark.parametrize("lengths", [[1], [7, 7, 7], [1, 10**6], [100, 101, 140]])
def test_text_histogram_of_odd_texts(lengths):
    bins = text_lengths.histogram(lengths)
    assert sum(part.count for part in bins) == len(lengths)
    assert all(part.low <= part.length < part.high for part in bins)


def test_text_without_a_paragraph(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n")
    with pytest.raises(ValueError, match=r"--text .* is empty"):
        text_lengths.read(str(empty))


def test_text_and_seq_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="--seq and --text both set the lengths"):
        parsed("--device=cpu", "--seq=16", f"--text={tmp_path}")


def test_tokenizer_counts(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    word_level = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    word_level.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    word_level.save(str(tmp_path / "words.json"))
    text = tmp_path / "text.txt"
    text.write_text("one two three\n\nfour five")
    found = text_lengths.read(str(text), str(tmp_path / "words.json"))
    assert (found.unit, found.paragraphs, found.tokens) == ("tokens of words.json", 2, 5)


def test_tokenizer_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    text = tmp_path / "text.txt"
    text.write_text("one")
    with pytest.raises(ValueError, match="pip install tokenizers"):
        text_lengths.read(str(text), "words.json")


# --- Implementations ------------------------------------------------------------------------------


def test_reference_is_never_called_fused():
    assert providers.label("fused", "reference") == "reference (not fused)"
    assert providers.label("fused", "triton") == "fused (triton)"
    assert providers.label("fused", "cpu") == "fused (cpu)"


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_backend_is_the_one_that_runs(dropout_p, monkeypatch):
    from fusedformer.kernels import dispatch

    case = Case(1, 2, 16, 8, dropout_p=dropout_p)
    tensors = providers.inputs(case)
    ran = []
    pick = dispatch.pick
    monkeypatch.setattr(
        dispatch, "pick", lambda *args: ran.append(pick(*args).__name__) or pick(*args)
    )
    said = providers.backend("fused", case, tensors)
    forward, backward = providers.call("fused", case, tensors)
    backward(forward())
    assert len(set(ran)) == 1
    assert said in dispatch.BACKENDS
    assert dispatch.BACKENDS[said].format(file=dispatch.OPS["attention"]) == ran[0]


@pytest.mark.parametrize("dtype", providers.DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("impl", providers.IMPLS)
def test_implementations_agree_with_float64(impl, causal, dtype):
    errors = providers.error_of(impl, Case(1, 2, 33, 8, dtype=dtype, causal=causal))
    bound = 20 * torch.finfo(providers.DTYPES[dtype]).eps
    assert 0 < errors["forward"] < bound
    assert 0 < errors["backward"] < bound


def test_errors_with_dropout():
    case = Case(1, 2, 33, 8, dropout_p=0.3)
    assert providers.error_of("plain", case) is None
    assert providers.error_of("fused", case)["backward"] < 1e-5


# --- Memory and processes -------------------------------------------------------------------------


def _touch(mebibytes: int) -> dict:
    torch.ones(2**20, dtype=torch.uint8)  # the tiny warm-up: threads and code
    meter = memory.PeakMeter("cpu")
    held = torch.ones(mebibytes * 2**20, dtype=torch.uint8)
    del held
    return {"extra": meter.extra()}


def _exhaust() -> None:
    torch.empty(2**62, dtype=torch.uint8)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fail() -> None:
    raise RuntimeError("the first line\nthe second")


def test_peak_memory_of_a_known_allocation():
    with workers.Workers(fresh=True) as pool:
        extra = [pool.run(_touch, size).value["extra"] for size in (200, 10, 200)]
    assert extra == pytest.approx([200 * 2**20, 10 * 2**20, 200 * 2**20], abs=2 * 2**20)


@pytest.mark.parametrize("fresh", [True, False])
def test_workers_survive_what_they_run(fresh):
    with workers.Workers(fresh) as pool:
        assert pool.run(_exhaust).status == workers.OUT_OF_MEMORY
        failed = pool.run(_fail)
        assert (failed.status, failed.reason) == (workers.FAILED, "RuntimeError: the first line")
        if hasattr(signal, "SIGKILL"):
            died = pool.run(_die)
            assert died.status == workers.OUT_OF_MEMORY
            assert "killed" in died.reason
        assert pool.run(os.getpid).value != os.getpid()


def test_a_call_that_takes_too_long_is_ended():
    with workers.Workers(fresh=True) as pool:
        outcome = pool.run(time.sleep, 60, timeout=0.1)
        assert (outcome.status, outcome.reason) == (workers.TOO_SLOW, "not done after 0 s")
        assert pool.run(abs, -1).value == 1


def test_what_does_not_fit_is_a_row(monkeypatch):
    class Pool:
        """Has a backend for everything, 1 GB of memory, and never runs."""

        def run(self, function, *args, timeout):
            assert function is points.look
            backends = {"fused": "reference", "plain": "eager", "sdpa": "flash"}
            return workers.Outcome(workers.OK, ({i: backends[i] for i in args[0]}, 10**9))

    plan = [sweep.Point("seq", Case(1, 8, 2**20, 64))]
    walk = sweep.Sweep(["fused", "plain"], Pool(), budget=100)
    list(walk.run(plan, lambda *_: None))
    assert [row["status"] for row in walk.rows] == [sweep.DOES_NOT_FIT] * 2
    assert re.fullmatch(r"needs about [\d.]+ GB; 1.0 GB are available", walk.rows[0]["reason"])
    assert "forward_ms" not in walk.rows[0]


def test_a_spent_budget_is_a_row():
    with workers.Workers(fresh=True) as pool:
        walk = sweep.Sweep(["plain"], pool, budget=100)
        plan = [sweep.Point("seq", Case(1, 1, n, 8)) for n in (16, 2**20)]
        started = walk.run(plan, lambda *_: None)
        next(started)
        walk.budget = 0
        list(started)
    assert [row["status"] for row in walk.rows] == [workers.OK, sweep.OVER_BUDGET]
    assert "of 0 s are left" in walk.rows[1]["reason"]


def test_later_passes_add_samples():
    with workers.Workers(fresh=True) as pool:
        walk = sweep.Sweep(["plain", "sdpa"], pool, budget=100)
        passes = []
        plan = [sweep.Point("seq", Case(1, 1, n, 8)) for n in (16, 32)]
        list(walk.run(plan, lambda number, _: passes.append(number)))
    assert passes == [n for n in range(1, sweep.PASSES + 1) for _ in plan]
    assert all(len(row["forward_ms"]["samples"]) >= sweep.PASSES for row in walk.rows)


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    return folder, run(folder)


def test_json(whole_run):
    _, found = whole_run
    assert found["schema_version"] == results.SCHEMA_VERSION
    assert found["state"] == "complete"
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["rng_version"] >= 1
    assert len(found["rows"]) == 3 * (1 + 2 * 4)
    for row in found["rows"]:
        assert row["status"] == workers.OK
        for phase in ("forward_ms", "backward_ms"):
            held = row[phase]
            assert 0 < held["p20"] <= held["median"] <= held["p80"]
            assert len(held["samples"]) >= sweep.PASSES
        assert row["memory"]["training_bytes"] >= row["memory"]["forward_bytes"] >= 0
        assert not (row["backend"] == "reference" and row["label"].startswith("fused"))
    assert all(not law["fitted"] and "5 are needed" in law["reason"] for law in found["fits"])
    with_error = {(e["impl"], e["dropout_p"]) for e in found["errors"]}
    assert with_error == {("fused", 0), ("sdpa", 0), ("plain", 0), ("fused", 0.1)}


def test_page_is_self_contained(whole_run):
    folder, found = whole_run
    html = (folder / "attention.html").read_text()
    assert not re.search(r"<script|<link[^>]+href=\"(?!data:)|src=|url\((?!#)|@import", html)
    assert not re.search(r"https?://(?!www\.w3\.org/)", html)  # XML namespaces are only names
    assert "prefers-color-scheme" in html
    assert 'name="viewport"' in html
    for row in found["rows"]:
        assert row["label"] in html
    if "<svg" in html:
        assert html.count("<svg") == 2 * 4 + 2  # time and memory of each variant, and over d
        ids = re.findall(r'\bid="([^"]+)"', html)
        assert len(ids) == len(set(ids))


def test_chart(whole_run):
    pytest.importorskip("matplotlib")
    folder, _ = whole_run
    assert (folder / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_terminal(tmp_path, capsys):
    run(tmp_path, *PLAIN)
    said = capsys.readouterr().out
    assert "plain (eager)" in said
    assert re.search(r"not fitted: \d of 2 points over 1 ms; 5 are needed", said)
    assert "attention.json" in said


def test_without_matplotlib_and_rich(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fusedformer.benchmarks.charts", raising=False)
    from fusedformer import benchmarks

    monkeypatch.delattr(benchmarks, "charts", raising=False)
    monkeypatch.setattr(terminal, "HAS_RICH", False)
    found = run(tmp_path, *PLAIN)
    assert not (tmp_path / "attention.png").exists()
    assert "matplotlib is not installed" in (tmp_path / "attention.html").read_text()
    assert [line.split()[-4] for line in found["left_out"]] == ["(matplotlib", "(rich"]
    said = capsys.readouterr().out
    assert "Left out: the PNG chart" in said
    assert "Full, no dropout: over sequence length N" in said


def test_text_sets_the_sweep_and_the_weights(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("x" * n for n in (8, 8, 8, 24, 60)))
    argv = ["profile", "attention", "--device=cpu", "--heads=1", "--head-dim=8"]
    assert cli.main([*argv, *PLAIN, f"--text={text}", f"--out={tmp_path}"]) == 0
    found = json.loads((tmp_path / "attention.json").read_text())
    assert [part["count"] for part in found["text"]["bins"]] == [3, 1, 1]
    assert {row["seq"] for row in found["rows"]} == {8, 24, 60}
    medians = {
        row["seq"]: row["forward_ms"]["median"] + row["backward_ms"]["median"]
        for row in found["rows"]
    }
    total = found["text_totals"][0]
    assert total["seconds"] * 1e3 == pytest.approx(3 * medians[8] + medians[24] + medians[60])
    said = capsys.readouterr().out
    assert "counted in UTF-8 bytes" in said
    assert "5 paragraphs" in said


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision(tmp_path, dtype):
    found = run(tmp_path, f"--dtype={dtype}", "--causal=yes", "--head-dim-sweep=0", "--seq=16")
    assert {row["status"] for row in found["rows"]} == {workers.OK}
    assert {row["dtype"] for row in found["rows"]} == {dtype}


@pytest.mark.parametrize("points_done", [0, 4])
def test_interrupt_keeps_what_was_measured(points_done, tmp_path, monkeypatch):
    whole = sweep.Sweep.run

    def cut(self, plan, before):
        for index, _ in enumerate(whole(self, plan[:points_done], before), 1):
            yield
            if index == points_done:
                break
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep.Sweep, "run", cut)
    assert cli.main(["profile", "attention", *TINY, "--out", str(tmp_path)]) == profile.INTERRUPTED
    found = json.loads((tmp_path / "attention.json").read_text())
    assert found["state"] == "interrupted"
    assert len(found["rows"]) == points_done * 3
    assert "Interrupted" in (tmp_path / "attention.html").read_text()


@pytest.mark.parametrize(("load", "said"), [(0.3, False), (5.0, True), (None, False)])
def test_a_busy_machine_is_said(load, said):
    document = {"environment": {"load": load, "logical_cores": 4}}
    assert (page.busy(document) is not None) == said


def test_exponent_notes_are_said_once():
    law = {"sweep": "seq", "impl": "plain", "causal": False, "dropout_p": 0.0, "label": "plain"}
    fitted = {"fitted": True, "exponent": 2.0, "low": 1.9, "high": 2.1, "used": [1, 2, 3, 4, 5]}
    names = ("forward_ms", "backward_ms", "training_bytes")
    document = {"fits": [law | {"quantity": name} | fitted for name in names]}
    (table,) = tables.exponents(document, "seq")
    assert table.rows == [["full, no dropout", "plain", *["2.00 (1.90 to 2.10) [a]"] * 3]]
    assert table.notes == ("[a] fitted on N = 1, 2, 3, 4, 5",)
