"""The page of a bench run, and of the benchmarks of a GPU run."""

from fusedformer.benchmarks import bench_tables, page
from fusedformer.benchmarks.tables import Table, number


def html(document: dict) -> str:
    """The whole page; without matplotlib it has no charts, and says so."""
    name = document["environment"].get("device_name", "")
    return page.page(
        f"Benchmarks: {name}",
        [
            *page.heading("Ops beside those of PyTorch and others", setting(document), document),
            *map(page.table, bench_tables.reach(document)),
            *_charts(document),
            "<h2>All measurements</h2>",
            *page.folded(bench_tables.details(document)),
            "<h2>How it was measured</h2>",
            *page.paragraphs(method(document)),
            *map(page.table, _ceilings(document)),
            page.facts(document),
        ],
    )


def setting(document: dict) -> str:
    """One line: what was measured on what."""
    environment = document["environment"]
    threads = page.threads(environment)
    return f"{environment['device_name']}{threads}, PyTorch {environment['torch']}"


def method(document: dict) -> list[str]:
    """How times, ratios, memory and errors came about."""
    gpu = document["environment"]["device"] == "cuda"
    clock = "CUDA events, from a cold L2 cache" if gpu else "the wall clock"
    return [
        f"Time: {clock}; random inputs, several sets in turn; implementations take turns within "
        "each round, in rotated order; tables show medians with 20/80 percentiles. A ratio is the "
        "median of the ratios of each round.",
        "Memory: the peak of one call beyond its inputs"
        + (", by torch's allocator." if gpu else ", by the resident set of a fresh process."),
        "Errors: |result - truth| / |truth| against float64, L2; backward: the worst gradient. "
        "With dropout, other implementations' masks cannot be drawn again, and they are compared "
        "without. A result whose error is ten times that of the formula in plain PyTorch, in the "
        "same dtype, is called wrong and its speed is withheld.",
        "TFLOP/s and GB/s count what the op needs, not what an implementation does.",
    ]


def _ceilings(document: dict) -> list[Table]:
    held = document.get("ceilings")
    if not held:
        return []
    rows = [["copy", f"{number(held['copy_gbps'])} GB/s"]]
    rows += [
        [f"product, {dtype}", f"{number(rate)} TFLOP/s"]
        for dtype, rate in held["matmul_tflops"].items()
    ]
    rows.append(["one small call", f"{number(held['call_us'])} µs"])
    return [Table("Ceilings, measured in the same run", ["what", "rate"], rows)]


def _charts(document: dict) -> list[str]:
    try:
        from fusedformer.benchmarks import bench_charts, charts
    except ImportError:
        return ['<p class="state">No charts: matplotlib is not installed.</p>']
    found = []
    for title, wide, drawn in (
        ("Speed-ups", True, bench_charts.speedups(document)),
        ("Cost over size", False, bench_charts.growth(document)),
        ("Roofline", True, bench_charts.roofline(document)),
    ):
        kind = title[:2].lower()
        svgs = [
            (chart.title, charts.svg(chart.draw, f"{kind}{index}-", chart.size))
            for index, chart in enumerate(drawn)
        ]
        found.append(page.figures(title, svgs, wide))
    return found
