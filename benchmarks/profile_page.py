"""The page of an attention profile."""

from html import escape

from fusedformer.benchmarks import page, tables


def html(document: dict) -> str:
    """The whole page; without matplotlib it has no charts, and says so."""
    measured = (
        *tables.measurements(document, "seq"),
        *tables.measurements(document, "head_dim"),
        *tables.errors(document),
    )
    name = document["environment"]["device_name"]
    return page.page(
        f"Attention profile: {name}",
        [
            *page.heading(
                "How attention's cost grows with its lengths", setting(document), document
            ),
            f"<p>{escape(reading(document))}</p>",
            *map(page.table, tables.text(document)),
            *map(page.table, tables.exponents(document, "seq")),
            *map(page.table, tables.crossings(document)),
            *_charts(document),
            *map(page.table, tables.exponents(document, "head_dim")),
            "<h2>All measurements</h2>",
            *page.folded((*measured, *tables.intensity(document))),
            "<h2>How it was measured</h2>",
            *page.paragraphs(method(document)),
            page.facts(document),
        ],
    )


def setting(document: dict) -> str:
    """One line: what was measured on what."""
    options, environment = document["options"], document["environment"]
    threads = page.threads(environment)
    return (
        f"{environment['device_name']}{threads}, PyTorch {environment['torch']}; "
        f"{options['dtype']}, batch {options['batch']}, {options['heads']} heads, "
        f"head dimension {options['head_dim']}"
    )


def reading(document: dict) -> str:
    """How to read the charts."""
    fused = {r["backend"] for r in document["rows"] if r["impl"] == "fused"}
    note = ""
    if "reference" in fused:
        note = (
            " No fused backend ran every point here: rows called “reference (not fused)” are this "
            "project's formulas in PyTorch's own ops, which exist to be right, not fast."
        )
    return (
        "Both axes are logarithmic, so that a cost of N to the power k is a straight line of "
        "slope k: each doubling of the length multiplies it by 2^k. Beside a name in a time chart "
        "stands the exponent of its forward." + note
    )


def method(document: dict) -> list[str]:
    """How times, memory and exponents came about."""
    gpu = document["environment"]["device"] == "cuda"
    clock = "CUDA events, from a cold L2 cache" if gpu else "wall clock"
    return [
        f"Time: {clock}; random inputs; implementations take turns within each round; the table "
        "shows medians. Every point is measured once, then again in further passes while time is "
        "left; the JSON file holds every sample, with the 20/80 percentiles.",
        f"Memory: {document['memory_method']}; forward with backward, beyond the inputs.",
        "Exponents: least squares on the logarithms of at least five points that each take over "
        "1 ms (memory: over 1 MiB); the range is the 95% confidence interval of the slope.",
        f"The run took {document['seconds']:.0f} s of a budget of "
        f"{document['options']['budget']:g} s.",
    ]


def _charts(document: dict) -> list[str]:
    try:
        from fusedformer.benchmarks import charts, profile_charts
    except ImportError:
        return ['<p class="state">No charts: matplotlib is not installed.</p>']
    rows, found = document["rows"], []
    for sweep, title in (("seq", "Over sequence length"), ("head_dim", "Over head dimension")):
        shown = [panel for panel in profile_charts.panels(rows) if panel.sweep == sweep]
        drawn = [
            (f"{panel.title}, {title.lower()}", profile_charts.svg(panel, document))
            for panel in shown
        ]
        found.append(page.figures(title, drawn))
    if roof := profile_charts.roofline(document):
        about = "Forward without dropout: operations a second over operations a byte"
        found.append(page.figures("Roofline", [(about, charts.svg(roof, "roofline-"))]))
    return found
