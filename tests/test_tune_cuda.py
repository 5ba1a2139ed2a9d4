"""The command that times variants of the CUDA kernels: what it does with what it finds."""

import json
import sys

import pytest
import torch

from fusedformer.benchmarks import cuda_variants, tune_cuda, workers
from fusedformer.benchmarks.cuda_variants import Variant

VARIANTS = [
    Variant(0, "", 64, True, True), Variant(1, "fast", 64, True, False),
    Variant(2, "wrong", 64, True, True), Variant(3, "", 192, True, True),
]  # fmt: skip
MILLISECONDS = {0: 2.0, 1: 1.0, 3: 4.0}


class Worker:
    """In the place of workers.Workers: what a GPU would have said."""

    def __init__(self, **options):
        self.asked = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def run(self, function, *args, timeout):
        assert timeout > 0
        if function is tune_cuda.check:
            if VARIANTS[args[0]].name == "wrong":
                return workers.Outcome(workers.FAILED, reason="AssertionError: it is wrong")
            return workers.Outcome(workers.OK)
        indices, causal, p, _ = args
        assert 2 not in indices  # it is not timed
        assert all(VARIANTS[i].takes(p) for i in indices)
        if indices == [3] and causal and p:
            return workers.Outcome(workers.TOO_SLOW, reason="not done after 3 s")
        return workers.Outcome(workers.OK, {i: MILLISECONDS[i] for i in indices})


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(cuda_variants, "variants", lambda: VARIANTS)
    monkeypatch.setattr(workers, "Workers", Worker)
    return [row for found in tune_cuda.run(100.0) for row in found]


def test_rows(rows):
    found = {(r["case"]["dim"], r["case"]["causal"], r["case"]["p"], r["variant"]): r for r in rows}
    assert len(found) == len(rows) == 2 * (3 + 2) + 2 * (1 + 1)
    fast = found[64, True, 0.0, "fast"]
    assert (fast["ms"], fast["default_ms"], fast["speedup"]) == (1.0, 2.0, 2.0)
    assert (fast["correct"], fast["reason"], fast["case"]["heads"]) == (True, None, 32)
    wrong = found[64, False, 0.1, "wrong"]
    assert (wrong["correct"], wrong["ms"], wrong["speedup"]) == (False, None, None)
    assert wrong["reason"] == "AssertionError: it is wrong"
    slow = found[192, True, 0.1, "present"]
    assert (slow["correct"], slow["reason"], slow["ms"]) == (True, "not done after 3 s", None)
    assert found[64, True, 0.1, "present"]["speedup"] == 1.0
    json.dumps(rows)


def test_table(rows):
    lines = tune_cuda.table(rows).splitlines()
    assert len(lines) == len(rows)
    assert any("fast" in line and "1.000 ms  2.000x" in line for line in lines)
    assert any("wrong" in line and "wrong: AssertionError" in line for line in lines)


def test_what_was_measured_before_a_cut_is_kept(monkeypatch, tmp_path):
    def cut(seconds):
        yield [{"variant": "kept"}]
        raise KeyboardInterrupt

    monkeypatch.setattr(tune_cuda, "unsupported_gpu", lambda device: None)
    monkeypatch.setattr(tune_cuda.environment, "describe", lambda device: {})
    monkeypatch.setattr(tune_cuda, "table", lambda rows: "")
    monkeypatch.setattr(tune_cuda, "run", cut)
    monkeypatch.setattr(sys, "argv", ["tune_cuda", "--out", str(tmp_path / "x.json")])
    assert tune_cuda.main() == 130
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == [{"variant": "kept"}]


def test_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune_cuda", "--out", str(tmp_path / "x.json")])
    assert tune_cuda.main() == 2
    assert capsys.readouterr().err == "tune_cuda: no CUDA GPU is available\n"
    assert not list(tmp_path.iterdir())
