"""The attention profile before it measures: fits, options, lengths of a text."""

import argparse
import sys

import pytest
import torch

from fusedformer import cli
from fusedformer.benchmarks import fit, options, results, text_lengths


def parsed(*argv: str) -> options.Options:
    parser = argparse.ArgumentParser()
    options.add_options(parser)
    return options.parse(parser.parse_args(argv))


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


@pytest.mark.parametrize(
    ("a", "b", "kind", "x"),
    [
        ([(1, 1.0), (2, 2.0)], [(1, 2.0), (2, 4.0)], "from the first", 1),
        ([(1, 3.0), (2, 6.0)], [(1, 2.0), (2, 4.0)], "never", None),
        ([(4, 2.0), (16, 4.0)], [(4, 1.0), (16, 8.0)], "at", 8),
        # Ahead, behind, ahead again: only the last time counts.
        ([(1, 1.0), (2, 2.0), (8, 2.0)], [(1, 2.0), (2, 1.0), (8, 4.0)], "at", 4),
        # Equal is not below.
        ([(1, 1.0), (2, 1.0), (4, 1.0)], [(1, 2.0), (2, 1.0), (4, 2.0)], "at", 2),
        ([(1, 1.0), (2, 1.0)], [(3, 2.0), (4, 4.0)], "not measured", None),
    ],
)
def test_crossing(a, b, kind, x):
    found = fit.crossing(a, b)
    assert found["kind"] == kind
    assert found["x"] == (x if x is None else pytest.approx(x))


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
