"""What a training says of itself: a file of metrics, the curve of losses, progress."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

try:
    import rich.console
    import rich.progress

    HAS_RICH = True
except ImportError:
    HAS_RICH = False


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that was cut off by a kill is left out."""
    lines = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines


class Metrics:
    """metrics.jsonl: a JSON object a line, each with its "step".

    Args:
        file: is made, or continued.
        step: the step that training goes on from; what a run that was killed wrote past it goes.
    """

    def __init__(self, file: Path, step: int) -> None:
        self._file = file
        kept = [line for line in read_metrics(file) if line["step"] <= step]
        unfinished = file.with_name(f".{file.name}.unfinished")
        with unfinished.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n" for line in kept)
            out.flush()
            os.fsync(out.fileno())
        unfinished.replace(file)

    def write(self, **values: Any) -> None:
        """Adds a line."""
        with self._file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(values) + "\n")


def draw_losses(folder: Path, baselines: "dict[str, float] | None" = None) -> bool:
    """loss.png beside a metrics.jsonl: the curve of its losses.

    Args:
        folder: where both are.
        baselines: name -> nats, each a horizontal line.

    Returns:
        Whether it was drawn: not without matplotlib, or without losses.
    """
    lines = read_metrics(folder / "metrics.jsonl")
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
    if not training:
        return False
    try:
        # Not pyplot: it would choose a window system, and keep the figure.
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*training, strict=True), label="training", linewidth=1)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", label="held out", markersize=3)
    for name, value in (baselines or {}).items():
        axes.axhline(value, linestyle="--", linewidth=1, color="grey")
        axes.annotate(name, (training[0][0], value), va="bottom", color="grey")
    axes.set(xlabel="step", ylabel="cross-entropy (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=150)
    return True


class Progress:
    """A bar on stderr; where that is no terminal, a line now and then. A context manager.

    Args:
        steps: how many there will be.
        done: how many are.
        shown: False says nothing.
    """

    def __init__(self, steps: int, done: int, shown: bool) -> None:
        self._steps, self._shown = steps, shown
        self._bar: Any = None
        if shown and HAS_RICH and sys.stderr.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.BarColumn(bar_width=20),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.description}"),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TextColumn("left"),
                rich.progress.TimeRemainingColumn(),
                console=rich.console.Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=steps, completed=done)
        self._started, self._done_before = time.monotonic(), done

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, done: int) -> None:
        """A step is done."""
        if self._bar:
            self._bar.update(self._task, completed=done)

    def metrics(self, done: int, text: str) -> None:
        """What was measured lately."""
        if self._bar:
            self._bar.update(self._task, description=text)
        elif self._shown:
            rate = (time.monotonic() - self._started) / max(1, done - self._done_before)
            left = rate * (self._steps - done)
            self.say(f"[{done}/{self._steps}] {text}, {left // 60:.0f}:{left % 60:02.0f} left")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._shown:
            print(text, file=sys.stderr, flush=True)


def summary(line: dict[str, Any], unit: str) -> str:
    """A line of metrics in words."""
    parts = [f"loss {line['loss']:.3f}"]
    if "tokens_per_second" in line:
        rate = line["tokens_per_second"]
        parts.append(f"{rate / 1000:.1f}k {unit}/s" if rate >= 1000 else f"{rate:.0f} {unit}/s")
    if "utilisation" in line:
        parts.append(f"{100 * line['utilisation']:.0f}% of matmul speed")
    return ", ".join(parts)
