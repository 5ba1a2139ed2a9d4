"""A profile as one self-contained HTML page: no script, no network, light and dark, any width."""

from html import escape

from fusedformer.benchmarks import tables
from fusedformer.benchmarks.tables import Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --paper: #ffffff;
  --card: #f6f8fa; --line: #d1d9e0; --accent: #b54a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117;
  --card: #151b23; --line: #3d444d; --accent: #ff9e5e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1.5rem 1rem 3rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .75rem; }
p { margin: .4rem 0; max-width: 46rem; }
.soft, figcaption, caption, .notes { color: var(--soft); }
.state { color: var(--accent); font-weight: 600; }
.charts { display: grid; gap: 1rem; margin-bottom: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
figure { margin: 0; padding: .5rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
figure svg { display: block; width: 100%; height: auto; color: var(--ink); }
.scroll { overflow-x: auto; margin: 0 0 1.5rem; border: 1px solid var(--line);
  border-radius: .5rem; }
.scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; font-size: .875rem; width: 100%;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .6rem .75rem; background: var(--card); font-weight: 600; }
th, td { padding: .3rem .75rem; text-align: right; white-space: nowrap;
  border-top: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
th.text, td.text { text-align: left; }
tbody th { font-weight: 600; }
details { margin: 0 0 .5rem; } summary { cursor: pointer; padding: .3rem 0; }
.notes { font-size: .85rem; margin: 0 0 1.5rem; padding-left: .75rem; list-style: none;
  overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { table { font-size: .75rem; }
  th, td { padding: .3rem .35rem; white-space: normal; } }
"""

_FACTS = (
    ("device_name", "device"),
    ("threads", "CPU threads"),
    ("cpu_capability", "CPU instructions"),
    ("system", "system"),
    ("python", "Python"),
    ("torch", "PyTorch"),
    ("triton", "Triton"),
    ("fusedformer", "fusedformer"),
    ("commit", "commit"),
)


def page(document: dict) -> str:
    """The whole page; without matplotlib it has no charts, and says so."""
    options, environment = document["options"], document["environment"]
    interrupted = document["state"] != "complete"
    parts = [
        "<h1>How attention's cost grows with its lengths</h1>",
        f'<p class="soft">{escape(setting(document))}. {escape(_when(document))}</p>',
        '<p class="state">Interrupted: what was measured up to then.</p>' if interrupted else "",
        f'<p class="state">{escape(warning)}</p>' if (warning := busy(document)) else "",
        f"<p>{escape(reading(document))}</p>",
        *(_table(table) for table in tables.text(document)),
        *(_table(table) for table in tables.exponents(document, "seq")),
        _charts(document["rows"]),
        *(_table(table) for table in tables.exponents(document, "head_dim")),
        "<h2>All measurements</h2>",
        *(
            f"<details><summary>{escape(table.caption)}</summary>{_table(table)}</details>"
            for table in (
                *tables.measurements(document, "seq"),
                *tables.measurements(document, "head_dim"),
                *tables.errors(document),
            )
        ),
        "<h2>How it was measured</h2>",
        *(f"<p>{escape(line)}</p>" for line in method(document)),
        "<dl>",
        *(
            f"<dt>{name}</dt><dd>{escape(str(environment[key]))}</dd>"
            for key, name in _FACTS
            if environment.get(key) is not None
        ),
        f"<dt>options</dt><dd>{escape(_listed(options))}</dd>",
        "</dl>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>Attention profile: {escape(environment['device_name'])}</title>\n"
        f"<style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def setting(document: dict) -> str:
    """One line: what was measured on what."""
    options, environment = document["options"], document["environment"]
    threads = f", {environment['threads']} threads" if environment["device"] == "cpu" else ""
    return (
        f"{environment['device_name']}{threads}, PyTorch {environment['torch']}; "
        f"{options['dtype']}, batch {options['batch']}, {options['heads']} heads, "
        f"head dimension {options['head_dim']}"
    )


def busy(document: dict) -> "str | None":
    """A warning where other work was running when the profile began, else None."""
    environment = document["environment"]
    load, cores = environment["load"], environment["logical_cores"]
    if not load or not cores or load < 0.5 * cores:
        return None
    return (
        f"The machine was busy when this began (load {load:.1f} on {cores} cores): times are too "
        "long and uneven, and exponents bend. Memory is not affected."
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
        "slope k: each doubling of the length multiplies it by 2^k." + note
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


def _charts(rows: list[dict]) -> str:
    try:
        from fusedformer.benchmarks import charts
    except ImportError:
        return '<p class="state">No charts: matplotlib is not installed.</p>'
    parts = []
    for sweep, title in (("seq", "Over sequence length"), ("head_dim", "Over head dimension")):
        shown = [panel for panel in charts.panels(rows) if panel.sweep == sweep]
        figures = [
            f'<figure role="img" aria-label="{escape(panel.title)}, {title.lower()}; '
            f'the tables below hold its numbers">{charts.svg(panel, rows)}</figure>'
            for panel in shown
        ]
        if figures:
            parts.append(f'<h2>{title}</h2><div class="charts">{"".join(figures)}</div>')
    return "\n".join(parts)


def _table(table: Table) -> str:
    texts = {i for i, _ in enumerate(table.head) if table.wordy(i)}

    def cell(i: int, content: str, tag: str, scope: str = "") -> str:
        kind = ' class="text"' if i in texts else ""
        return f"<{tag}{scope}{kind}>{escape(content)}</{tag}>"

    head = "".join(cell(i, name, "th", ' scope="col"') for i, name in enumerate(table.head))
    body = "".join(
        "<tr>"
        + cell(0, row[0], "th", ' scope="row"')
        + "".join(cell(i, content, "td") for i, content in enumerate(row[1:], 1))
        + "</tr>"
        for row in table.rows
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    caption = escape(table.caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>'
        f"<caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
    )


def _when(document: dict) -> str:
    return document["created"][:16].replace("T", " ") + " UTC"


def _listed(options: dict) -> str:
    values = {
        name: " ".join(map(str, held)) if isinstance(held, list) else held
        for name, held in options.items()
    }
    return ", ".join(f"{name} {held}" for name, held in values.items())
