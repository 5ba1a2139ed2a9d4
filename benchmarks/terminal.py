"""Progress and tables in the terminal: by rich where it is installed, else as plain text."""

import shutil
import sys
from types import TracebackType

from fusedformer.benchmarks.tables import Table

try:
    import rich.box
    import rich.console
    import rich.markup
    import rich.progress
    import rich.table

    HAS_RICH = True
except ImportError:
    HAS_RICH = False


class Progress:
    """A progress bar on stderr; where that is no terminal, one line a step. A context manager."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = 0
        self._bar = None
        if HAS_RICH and sys.stderr.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TextColumn("{task.description}"),
                console=rich.console.Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: "type[BaseException] | None",
        error: "BaseException | None",
        trace: "TracebackType | None",
    ) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, doing: str) -> None:
        """The next step begins."""
        if self._bar:
            self._bar.update(self._task, completed=self._done, description=doing)
        else:
            print(f"[{self._done + 1}/{self._steps}] {doing}", file=sys.stderr, flush=True)
        self._done += 1

    def stay(self, doing: str) -> None:
        """All steps are done and something goes on; shown on a bar alone."""
        if self._bar:
            self._bar.update(self._task, completed=self._steps, description=doing)


def show(tables: list[Table]) -> None:
    """Prints tables with their notes."""
    for table in tables:
        if HAS_RICH:
            _show_rich(table)
        else:
            print("\n" + plain(table))


def plain(table: Table) -> str:
    """A table as aligned text."""
    lines = [table.head, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.head))]
    text = [
        "  ".join(
            cell.ljust(width) if table.wordy(i) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    ruled = [table.caption, text[0], "-" * max(map(len, text)), *text[1:]]
    return "\n".join(ruled + [f"  {note}" for note in table.notes])


def _show_rich(table: Table) -> None:
    # A pipe or a log has no width of its own: there, lines are not cut.
    width = None if sys.stdout.isatty() else max(140, shutil.get_terminal_size().columns)
    console = rich.console.Console(width=width, highlight=False)
    held = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1))
    for i, name in enumerate(table.head):
        held.add_column(name, justify="left" if table.wordy(i) else "right")
    for row in table.rows:
        held.add_row(*map(rich.markup.escape, row))
    console.print()
    console.print(table.caption, style="bold", markup=False)
    console.print(held)
    for note in table.notes:
        console.print(f"  {note}", style="dim", markup=False)
