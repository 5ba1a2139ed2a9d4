"""One self-contained HTML page of a result: no script, no network, light and dark, any width."""

from collections.abc import Iterable
from html import escape

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
caption span { display: inline-block; position: sticky; left: .75rem;
  max-width: calc(100vw - 4rem); }
th, td { padding: .3rem .75rem; text-align: right; white-space: nowrap;
  border-top: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
th.text, td.text { text-align: left; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--paper); }
tbody th.text { white-space: normal; min-width: 9rem; }
details { margin: 0 0 .5rem; } summary { cursor: pointer; padding: .3rem 0; }
.notes { font-size: .85rem; margin: 0 0 1.5rem; padding-left: .75rem; list-style: none;
  overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.charts.wide { grid-template-columns: repeat(auto-fill, minmax(min(34rem, 100%), 1fr)); }
.wide figure { overflow-x: auto; } .wide svg { min-width: 30rem; }
@media (max-width: 40rem) { table { font-size: .75rem; }
  th, td { padding: .3rem .4rem; } tbody th.text { min-width: 7.5rem; } }
"""

_FACTS = (
    ("device_name", "device"),
    ("driver", "driver"),
    ("cuda", "CUDA"),
    ("threads", "CPU threads"),
    ("cpu_capability", "CPU instructions"),
    ("system", "system"),
    ("python", "Python"),
    ("torch", "PyTorch"),
    ("triton", "Triton"),
    ("fusedformer", "fusedformer"),
    ("commit", "commit"),
)


def page(title: str, parts: Iterable[str]) -> str:
    """The whole page: a title for the browser, and parts of HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, parts))
        + "\n</main></body></html>\n"
    )


def heading(title: str, said: str, document: dict) -> list[str]:
    """The title, what was measured on what and when, and what a reader must know first."""
    created = document["created"][:16].replace("T", " ") + " UTC"
    warning = busy(document)
    return [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(said)}. {created}</p>',
        '<p class="state">Interrupted: what was measured up to then.</p>'
        if document["state"] != "complete"
        else "",
        f'<p class="state">{escape(warning)}</p>' if warning else "",
    ]


def paragraphs(lines: Iterable[str]) -> list[str]:
    """Each line as a paragraph."""
    return [f"<p>{escape(line)}</p>" for line in lines]


def folded(tables: Iterable[Table]) -> list[str]:
    """Tables that open at a click on their caption."""
    return [
        f"<details><summary>{escape(held.caption)}</summary>{table(held)}</details>"
        for held in tables
    ]


def figures(title: str, drawn: Iterable[tuple[str, str]], wide: bool = False) -> str:
    """A section of charts, each (what it shows, its <svg>); "" without any."""
    held = [
        f'<figure role="img" aria-label="{escape(about)}; the tables hold its numbers">{svg}'
        "</figure>"
        for about, svg in drawn
    ]
    if not held:
        return ""
    kind = "charts wide" if wide else "charts"
    return f'<h2>{escape(title)}</h2><div class="{kind}">{"".join(held)}</div>'


def facts(document: dict) -> str:
    """Environment and options as a list."""
    environment = document["environment"]
    options = {
        name: " ".join(map(str, held)) if isinstance(held, list) else held
        for name, held in document["options"].items()
        if held not in (None, "")
    }
    listed = ", ".join(f"{name} {held}" for name, held in options.items())
    rows = [(name, environment[key]) for key, name in _FACTS if environment.get(key) is not None]
    rows.append(("options", listed))
    return (
        "<dl>"
        + "".join(f"<dt>{name}</dt><dd>{escape(str(held))}</dd>" for name, held in rows)
        + "</dl>"
    )


def threads(environment: dict) -> str:
    """How many threads a CPU's run had, to follow its name; "" on a GPU."""
    count = environment["threads"]
    if environment["device"] != "cpu":
        return ""
    return f", {count} thread{'s' if count != 1 else ''}"


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


def table(held: Table) -> str:
    """A table with its notes; it scrolls by itself where it is too wide."""
    texts = {i for i, _ in enumerate(held.head) if held.wordy(i)}

    def cell(i: int, content: str, tag: str, scope: str = "") -> str:
        kind = ' class="text"' if i in texts else ""
        return f"<{tag}{scope}{kind}>{escape(content)}</{tag}>"

    head = "".join(cell(i, name, "th", ' scope="col"') for i, name in enumerate(held.head))
    body = "".join(
        "<tr>"
        + cell(0, row[0], "th", ' scope="row"')
        + "".join(cell(i, content, "td") for i, content in enumerate(row[1:], 1))
        + "</tr>"
        for row in held.rows
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in held.notes)
    caption = escape(held.caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>'
        f"<caption><span>{caption}</span></caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
    )
