"""``fusedformer bench --base COMMIT``: this checkout beside another commit, in turns, in one run.

The other commit is checked out into a worktree of its own, whose benchmarks/ is this checkout's, so
that both are measured by the same code. Each has a process; they take turns of a few rounds, so
that a slow phase of the machine falls on both.
"""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fusedformer.benchmarks import measure, timing, workers
from fusedformer.benchmarks.entries import OVERHEAD, TIME, Entry
from fusedformer.benchmarks.runner import WRONG, Runner, new_row
from fusedformer.benchmarks.workers import Workers

ROOT = Path(__file__).resolve().parent.parent
BASE = "base"
_TURNS = 5


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[tuple[Path, str]]:
    """A checkout of a commit with this one's benchmarks: its folder, and the commit's short name.

    Raises:
        ValueError: this is no git checkout, or it has no such commit.
    """

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"--base {commit}: {done.stderr.strip().splitlines()[-1]}")
        return done.stdout.strip()

    name = git("rev-parse", "--short", "--verify", f"{commit}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="fusedformer-base-") as parent:
        folder = Path(parent) / "checkout"
        git("worktree", "add", "--detach", str(folder), name)
        try:
            shutil.rmtree(folder / "benchmarks", ignore_errors=True)
            (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
            yield folder, name
        finally:
            git("worktree", "remove", "--force", str(folder))


class BaseRunner(Runner):
    """Measures entries for "fused", here, and for "base", the same in another checkout."""

    def against(self, folder: Path, name: str) -> None:
        """Sets the other checkout; called once, before anything runs."""
        self._name = name
        roots = {"fused": ROOT, BASE: folder}
        self._sides = {
            impl: self._stack.enter_context(Workers(fresh=False, root=root))
            for impl, root in roots.items()
        }

    def entry(self, entry: Entry) -> list[dict]:
        """The two rows of one entry; the baseline of their ratio is the other commit."""
        entry = entry.at(baseline=BASE, goals=())
        rows = {impl: new_row(entry, "fused") | {"impl": impl} for impl in self._sides}
        limit = self._sides["fused"].run(measure.limits, entry.op, entry.case, entry.mode)
        for impl, row in rows.items():
            args = (entry.op, "fused", entry.case, entry.mode, entry.isa)
            found = self._sides[impl].run(measure.first, *args, timeout=self.limits.call)
            failed = found if found.status != workers.OK else limit
            if failed.status != workers.OK:
                row |= {"status": failed.status, "reason": failed.reason}
                continue
            row |= {name: found.value[name] for name in ("label", "memory")}
            row["error"] = found.value["error"] | {"limit": limit.value}
            if wrong := measure.verdict(row["error"], limit.value):
                row |= {"status": WRONG, "reason": wrong}
        rows[BASE]["label"] += f" at {self._name}"
        if entry.quantity in (TIME, OVERHEAD):
            self._turns(entry, rows)
        return list(rows.values())

    def _turns(self, entry: Entry, rows: dict[str, dict]) -> None:
        limits, host = self.limits, entry.quantity == OVERHEAD
        samples: dict[str, list[float]] = {}
        for turn in range(_TURNS):
            # Each begins as often as the other.
            for impl in sorted(rows, reverse=bool(turn % 2)):
                row = rows[impl]
                if row["status"] != workers.OK:
                    continue
                timed = self._sides[impl].run(
                    measure.times, entry.op, ["fused"], entry.case, entry.mode, entry.isa, host,
                    limits.seconds / _TURNS, 1, max(1, limits.max_rounds // _TURNS),
                    timeout=limits.call,
                )  # fmt: skip
                outcome = timed.value["fused"] if timed.status == workers.OK else timed
                if outcome.status == workers.OK:
                    samples.setdefault(impl, []).extend(outcome.value["ms"])
                else:
                    row |= {"status": outcome.status, "reason": outcome.reason}
        for impl, held in samples.items():
            if rows[impl]["status"] == workers.OK:
                rows[impl]["ms"] = timing.summary(held)
