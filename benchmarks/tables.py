"""The tables of a profile as plain data, which the terminal and the page both show."""

from dataclasses import dataclass
from pathlib import Path

from fusedformer.benchmarks import results, workers


@dataclass(frozen=True)
class Table:
    """A caption, column heads and rows of text; the first column names the row."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()

    def wordy(self, column: int) -> bool:
        """Whether a column holds words, which are aligned to the left, or numbers."""
        firsts = {row[column][:1] for row in self.rows}
        return any(c.isalpha() or c == "█" for c in firsts) or not any(map(str.isdigit, firsts))


_X = {"seq": "N", "head_dim": "d"}


def number(amount: "float | None") -> str:
    """Three significant digits, no exponent; an em dash for None."""
    if amount is None:
        return "—"
    if amount >= 100:
        return f"{amount:,.0f}"
    return f"{amount:.3g}" if amount >= 0.01 else f"{amount:.1g}"


def measurements(document: dict, sweep: str) -> list[Table]:
    """For each variant of a sweep: what ran, its times and its peak memory, over N (or d)."""
    rows = document["rows"]
    found = []
    for causal, dropout_p in results.variants(rows, sweep):
        members = [
            row
            for row in rows
            if (row["sweep"], row["causal"], row["dropout_p"]) == (sweep, causal, dropout_p)
        ]
        members.sort(key=lambda held: held[sweep])
        body = [[str(row[sweep]), row["label"], *_cells(row)] for row in members]
        head = [_X[sweep], "ran", "forward ms", "backward ms", "peak MiB", ""]
        found.append(Table(_caption(document, sweep, causal, dropout_p), head, body))
    return found


def _cells(row: dict) -> list[str]:
    said = "" if row["status"] == workers.OK else f"{row['status']}: {row['reason']}"
    quantities = ("forward_ms", "backward_ms", "training_bytes")
    return [*(number(results.value(row, name)) for name in quantities), said]


def _caption(document: dict, sweep: str, causal: bool, dropout_p: float) -> str:
    options = document["options"]
    what = results.variant_label(causal, dropout_p).capitalize()
    if sweep == "seq":
        return f"{what}: over sequence length N, head dimension {options['head_dim']}"
    return f"{what}: over head dimension d, sequence length {options['head_dim_seq']}"


def exponents(document: dict, sweep: str) -> list[Table]:
    """The fitted exponents of a sweep with their 95% ranges; notes list the points used."""
    groups: dict[tuple, dict[str, dict]] = {}
    for law in document["fits"]:
        if law["sweep"] == sweep:
            key = (law["causal"], law["dropout_p"], law["label"])
            groups.setdefault(key, {})[law["quantity"]] = law
    if not groups:
        return []
    marks: dict[str, str] = {}  # a note -> its letter
    body = [
        [results.variant_label(causal, dropout_p), label]
        + [_exponent(laws[quantity], _X[sweep], marks) for quantity in _FITTED]
        for (causal, dropout_p, label), laws in groups.items()
    ]
    return [
        Table(
            f"Exponent k of a cost that grows as {_X[sweep]}^k, with its 95% range",
            ["variant", "ran", *(results.QUANTITIES[quantity][0] for quantity in _FITTED)],
            body,
            tuple(f"[{letter}] {note}" for note, letter in marks.items()),
        )
    ]


_FITTED = ("forward_ms", "backward_ms", "training_bytes")


def _exponent(law: dict, x: str, marks: dict[str, str]) -> str:
    points = ", ".join(map(str, law["used"]))
    note = f"fitted on {x} = {points}" if law["fitted"] else f"not fitted: {law['reason']}"
    letter = marks.setdefault(note, _letter(len(marks)))
    if not law["fitted"]:
        return f"not fitted [{letter}]"
    return f"{law['exponent']:.2f} ({law['low']:.2f} to {law['high']:.2f}) [{letter}]"


def _letter(index: int) -> str:
    return chr(ord("a") + index % 26) + (str(index // 26) if index >= 26 else "")


def crossings(document: dict) -> list[Table]:
    """From which length on ours is below the others, in time and in memory."""
    pairs: dict[tuple, dict[str, dict]] = {}
    for found in document["crossings"]:
        key = (found["causal"], found["dropout_p"], found["label"])
        pairs.setdefault(key, {})[found["quantity"]] = found
    if not pairs:
        return []
    body = [
        [results.variant_label(causal, dropout_p), label]
        + [_crossing(by_quantity[quantity]) for quantity in ("time", "memory")]
        for (causal, dropout_p, label), by_quantity in pairs.items()
    ]
    return [
        Table(
            "Length from which ours costs less, forward and backward",
            ["variant", "than", "time", "peak memory"],
            body,
            ("Between two lengths that were measured, on the line through the logarithms.",),
        )
    ]


def _crossing(found: dict) -> str:
    if found["kind"] == "at":
        return f"N = {found['x']:.0f}"
    if found["kind"] == "from the first":
        return f"from the first, {found['x']}"
    return found["kind"]


def intensity(document: dict) -> list[Table]:
    """Operations a byte, and how much of the measured ceiling the forward reaches."""
    ceilings = document["ceilings"]
    peak = (ceilings or {}).get("matmul_tflops", {}).get(document["options"]["dtype"])
    if not peak:
        return []
    body = []
    for row in document["rows"]:
        if row["sweep"] != "seq" or row["dropout_p"] or "forward_ms" not in row:
            continue
        operations, moved = results.forward_work(row)
        per_byte = operations / moved
        rate = operations / row["forward_ms"]["median"] / 1e9
        roof = min(peak, per_byte * ceilings["copy_gbps"] / 1e3)
        body.append(
            [
                results.variant_label(row["causal"], 0.0), row["label"], str(row["seq"]),
                number(per_byte), number(rate), f"{rate / roof:.0%}",
            ]
        )  # fmt: skip
    head = ["variant", "ran", "N", "operations a byte", "TFLOP/s", "of the roof"]
    note = (
        f"The roof is the lower of {number(peak)} TFLOP/s, a large product's, and what "
        f"{number(ceilings['copy_gbps'])} GB/s, a large copy's, can feed; both measured here."
    )
    return [Table("Forward: arithmetic intensity and the roofline", head, body, (note,))]


def errors(document: dict) -> list[Table]:
    """Relative errors against float64."""
    if not document["errors"]:
        return []
    seq = document["errors"][0]["seq"]
    body = [
        [
            results.variant_label(found["causal"], found["dropout_p"]),
            found["label"],
            _error(found["forward"]),
            _error(found["backward"]),
        ]
        for found in document["errors"]
    ]
    return [
        Table(
            f"Relative error against float64 at N = {seq} (L2; backward: the worst gradient)",
            ["variant", "ran", "forward", "backward"],
            body,
            ("With dropout, torch's own masks cannot be repeated: only ours are compared.",)
            if any(p for p in document["options"]["dropout"])
            else (),
        )
    ]


def _error(amount: "float | None") -> str:
    return "—" if amount is None else f"{amount:.1e}"


def text(document: dict) -> list[Table]:
    """The histogram of a text's paragraphs, and what the whole text costs each series."""
    if not document["text"]:
        return []
    held = document["text"]
    most = max(part["count"] for part in held["bins"])
    bars = [
        [
            f"{part['low']} to {part['high'] - 1}",
            str(part["length"]),
            str(part["count"]),
            "█" * max(1, round(24 * part["count"] / most)),
        ]
        for part in held["bins"]
    ]
    unit = held["unit"]
    found = [
        Table(
            f"{held['paragraphs']} paragraphs of {Path(held['file']).name}, lengths in {unit}",
            ["length", "measured at", "paragraphs", ""],
            bars,
        )
    ]
    if document["text_totals"]:
        longest = results.longest_bins(held["bins"])
        share = sum(part["count"] for part in longest) / held["paragraphs"]
        span = f"{longest[0]['low']} to {longest[-1]['high'] - 1}"
        found.append(
            Table(
                "The whole text, one paragraph at a time, forward and backward",
                ["variant", "ran", "seconds", "of it in the longest"],
                [
                    [
                        results.variant_label(total["causal"], total["dropout_p"]),
                        total["label"],
                        number(total["seconds"]),
                        "—" if total["seconds"] is None else f"{total['longest_share']:.0%}",
                    ]
                    for total in document["text_totals"]
                ],
                (f"The longest: {span}, {share:.1%} of the paragraphs.",),
            )
        )
    return found


def everything(document: dict) -> list[Table]:
    """All tables of a document, in the order in which they are shown."""
    return [
        *text(document),
        *measurements(document, "seq"),
        *measurements(document, "head_dim"),
        *exponents(document, "seq"),
        *crossings(document),
        *intensity(document),
        *exponents(document, "head_dim"),
        *errors(document),
    ]
