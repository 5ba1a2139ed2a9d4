"""The suites of `fusedformer bench` as pytest-benchmark has them.

    pytest benchmarks/ --benchmark-only                     # the suite of this machine
    pytest benchmarks/ --benchmark-only -k "quick"          # at a reduced size
    pytest benchmarks/ --benchmark-only -k "full and bf16 and causal and not compile"

Each test is one implementation of one entry. Entries are measured by the runner of the command,
all implementations in turns; pytest-benchmark gets those times, and in extra_info TFLOP/s, GB/s,
memory, errors, the ratio to the baseline and what ran.
"""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from fusedformer.benchmarks import metrics, suites
from fusedformer.benchmarks.entries import Entry
from fusedformer.benchmarks.ops.registry import OPS
from fusedformer.benchmarks.runner import Limits, Runner

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SUITE = suites.SUITES["gpu" if DEVICE == "cuda" else "cpu"]


class Replay:
    """A timer that takes, from one call to the next but one, as long as a sample of ours did."""

    def __init__(self) -> None:
        self._times: Iterator[float] = iter(())

    def load(self, milliseconds: list[float]) -> None:
        self._times = (t for sample in milliseconds for t in (0.0, sample / 1e3))

    def __call__(self) -> float:
        return next(self._times, 0.0)


REPLAY = Replay()


@pytest.fixture(scope="session")
def measured() -> Iterator[Callable[[Entry], dict[str, dict]]]:
    """Gives the rows of an entry by implementation, measured once for all its tests."""
    with Runner(DEVICE, Limits(seconds=3.0)) as runner:
        yield functools.cache(lambda entry: {row["impl"]: row for row in runner.entry(entry)})


def _parameters(quick: bool) -> list:
    return [
        pytest.param(entry, impl, id=f"{entry.named()}, {impl}".replace(" ", "_"))
        for entry in SUITE(quick, DEVICE)
        for impl in entry.impls or OPS[entry.op].impls
    ]


def _check(benchmark, measured: Callable, entry: Entry, impl: str) -> None:
    rows = measured(entry)
    row = rows[impl]
    if row["status"] == "not available":
        pytest.skip(row["reason"])
    assert row["status"] == "ok", row["reason"]
    base = rows.get(row["baseline"])
    benchmark.group = entry.named()
    benchmark.extra_info |= {
        name: metric.value(row, base) for name, metric in metrics.METRICS.items()
    } | {"ran": row["label"], "version": row["version"], "quantity": row["quantity"]}
    # What is measured in bytes has no time: it stands in extra_info alone.
    samples = row["ms"]["samples"] if "ms" in row else [0.0]
    REPLAY.load(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples))


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize(("entry", "impl"), _parameters(quick=False))
def test_full(benchmark, measured, entry, impl):
    _check(benchmark, measured, entry, impl)


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize(("entry", "impl"), _parameters(quick=True))
def test_quick(benchmark, measured, entry, impl):
    _check(benchmark, measured, entry, impl)
