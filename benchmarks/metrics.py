"""The metrics of a bench row: what `--metrics` names, computed from what was measured.

Rows are those of the result file; see docs/result-schema.md.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fusedformer.benchmarks import timing
from fusedformer.benchmarks.entries import MEMORY, WORKSPACE
from fusedformer.benchmarks.tables import number


def ratio(row: dict, base: "dict | None") -> "dict[str, float] | None":
    """How many times the baseline's cost a row's is less: {"median", "p20", "p80"}.

    Of times, the quantiles of the ratios of each round, in which both took their turn; of memory,
    the one ratio. None where one was not measured.
    """
    if base is None:
        return None
    if row["quantity"] in (MEMORY, WORKSPACE):
        ours, theirs = memory(row), memory(base)
        if ours is None or theirs is None:
            return None
        value = theirs / max(ours, 1)
        return {"median": value, "p20": value, "p80": value}
    if "ms" not in row or "ms" not in base:
        return None
    pairs = zip(base["ms"]["samples"], row["ms"]["samples"], strict=False)
    ratios = [theirs / ours for theirs, ours in pairs]
    quantiles = {"median": 0.5, "p20": 0.2, "p80": 0.8}
    return {name: timing.quantile(ratios, q) for name, q in quantiles.items()}


def memory(row: dict) -> "float | None":
    """Bytes that a row is about: the peak beyond the inputs, of WORKSPACE less what is returned."""
    held = row.get("memory")
    if held is None or held["bytes"] is None:
        return None
    return max(0, held["bytes"] - (held["returned"] if row["quantity"] == WORKSPACE else 0))


def baseline_of(row: dict, rows: Iterable[dict]) -> "dict | None":
    """The row that a row's ratio is taken against."""
    return next((r for r in rows if r["key"] == row["key"] and r["impl"] == row["baseline"]), None)


def _rate(row: dict, quantity: str, unit: float) -> "float | None":
    if "ms" not in row or not row[quantity]:
        return None
    return row[quantity] / (row["ms"]["median"] * 1e-3) / unit


def _ms(row: dict, part: str) -> "float | None":
    return row["ms"][part] if "ms" in row else None


def _error(row: dict, part: str) -> "float | None":
    return row["error"][part] if "error" in row else None


def _exponent(value: "float | None") -> str:
    return "—" if value is None else f"{value:.1e}"


@dataclass(frozen=True)
class Metric:
    """A column: its head, its value of (row, baseline row or None), how the value is written."""

    head: str
    value: Callable[[dict, "dict | None"], "float | None"]
    text: Callable[["float | None"], str] = number


def _speedup(part: str) -> Callable[[dict, "dict | None"], "float | None"]:
    def value(row: dict, base: "dict | None") -> "float | None":
        found = ratio(row, base)
        return None if found is None else found[part]

    return value


METRICS = {
    "latency": Metric("ms", lambda row, base: _ms(row, "median")),
    "p20": Metric("20%", lambda row, base: _ms(row, "p20")),
    "p80": Metric("80%", lambda row, base: _ms(row, "p80")),
    "speedup": Metric("speed-up", _speedup("median")),
    "speedup_p20": Metric("20%", _speedup("p20")),
    "speedup_p80": Metric("80%", _speedup("p80")),
    "tflops": Metric("TFLOP/s", lambda row, base: _rate(row, "flops", 1e12)),
    "gbps": Metric("GB/s", lambda row, base: _rate(row, "bytes", 1e9)),
    "memory": Metric(
        "peak MiB",
        lambda row, base: (
            None if row.get("memory", {}).get("bytes") is None else row["memory"]["bytes"] / 2**20
        ),
    ),
    "error": Metric("error", lambda row, base: _error(row, "forward"), _exponent),
    "error_backward": Metric("backward", lambda row, base: _error(row, "backward"), _exponent),
}
DEFAULT = (
    "latency", "p20", "p80", "speedup", "tflops", "gbps", "memory", "error", "error_backward",
)  # fmt: skip
