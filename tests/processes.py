"""Processes that stay for all tests: each runs a function of its own in some of them."""

import datetime
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

PATIENCE = 90  # seconds until a test is given up


def _serve(rank: int, connection) -> None:
    torch.set_num_threads(1)
    while (task := connection.recv()) is not None:
        function, size, store, args = task
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=size,
                timeout=datetime.timedelta(seconds=PATIENCE / 2),
            )  # fmt: skip
            function(*args)
            dist.barrier()
            connection.send("")
        except BaseException:
            connection.send(traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


class Processes:
    """Up to ``count`` processes, started when first needed; on the CPU, joined by gloo."""

    def __init__(self, count: int, folder: Path) -> None:
        self.count, self.folder, self.runs = count, folder, 0
        self.workers: list = []

    def run(self, size: int, function: Callable, *args) -> None:
        """Calls function(*args) in a new default process group of ``size``; raises what it does."""
        if not self.workers:
            context = multiprocessing.get_context("spawn")
            for rank in range(self.count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
                process.start()
                self.workers.append((process, ours))
        self.runs += 1
        store = self.folder / f"store{self.runs}"
        for _, connection in self.workers[:size]:
            connection.send((function, size, store, args))
        errors = []
        for process, connection in self.workers[:size]:
            if not connection.poll(PATIENCE):
                errors.append("no answer")
            else:
                errors.append(connection.recv())
            if errors[-1]:
                process.kill()
        if any(errors):
            self.close()
            raise AssertionError("\n".join(f"process {n}: {e}" for n, e in enumerate(errors) if e))

    def close(self) -> None:
        """Ends the processes."""
        for process, connection in self.workers:
            try:
                connection.send(None)
            except OSError:
                process.kill()
            process.join(10)
            process.kill()
        self.workers = []
