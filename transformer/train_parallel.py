"""One process or many: torchrun's, with DDP or FSDP2. The rest of training asks only this module.

With DDP every process holds the model and they average gradients; with FSDP2 each holds a part of
every parameter, its gradient and the optimizer's state. Tensors are brought together one by one to
be saved, so that a checkpoint is the same whatever wrote it, and can be resumed by any other way.
"""

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusedformer.transformer.blocks import Stack

PARALLEL = ("ddp", "fsdp")


class Loss(nn.Module):
    """A model's loss as a forward, which is what DDP, FSDP2 and compile watch over."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, **inputs: Any) -> Tensor:
        """The model's method, such as model.loss(**inputs)."""
        return getattr(self.model, self.method)(**inputs)


class World:
    """The processes of this training; a context manager that joins and leaves them.

    Args:
        parallel: "ddp" or "fsdp", for a process that torchrun started; else it does nothing.

    Raises:
        ValueError: it is something else.
    """

    def __init__(self, parallel: str = "ddp") -> None:
        if parallel not in PARALLEL:
            raise ValueError(f"parallel must be one of {', '.join(PARALLEL)}; got {parallel!r}")
        self.parallel = parallel
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.many = self.size > 1
        local = int(os.environ.get("LOCAL_RANK", 0))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")

    def __enter__(self) -> "World":
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.many:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if self.many:
            gc.collect()  # what is left of DDP, in cycles
            if kind is None:
                self.wait()  # so that none leaves while another still reads what it sent
            dist.destroy_process_group()

    def wrap(self, model: nn.Module, method: str) -> tuple[nn.Module, nn.Module]:
        """(what to call with a batch, the same without DDP's hooks, for batches held out).

        Args:
            model: its parameters are spread over the processes, or copied to each.
            method: the model's, which gives the loss of a batch.
        """
        loss = Loss(model, method)
        if not self.many:
            return loss, loss
        if self.parallel == "ddp":
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(loss, device_ids=device_ids), loss
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh(self.device.type, (self.size,))
        for layer in layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(loss, mesh=mesh)
        return loss, loss

    @contextlib.contextmanager
    def synchronised(self, module: Any, last: bool) -> Iterator[None]:
        """Gradients are brought together only in the last of a step's backward passes."""
        if isinstance(module, nn.parallel.DistributedDataParallel) and not last:
            with module.no_sync():
                yield
            return
        if self.many and self.parallel == "fsdp":
            module.set_requires_gradient_sync(last)
        yield

    def share(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        values = [value]
        if self.many:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def sum(self, value: Tensor) -> Tensor:
        """The sum of all processes' values."""
        value = value.clone()
        if self.many:
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Until every process is here."""
        if self.many:
            dist.barrier()


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """Every layer of every stack: what is sharded, and recomputed, as one."""
    for module in model.modules():
        if isinstance(module, Stack):
            yield from module.layers


def whole(tensor: Any) -> Tensor:
    """All of a tensor of which this process may hold a part; every process has to ask."""
    tensor = tensor.detach()
    return tensor.full_tensor() if _in_parts(tensor) else tensor


def part_like(tensor: Tensor, like: Any) -> Tensor:
    """What this process is to hold of a whole tensor: the part that it holds of ``like``."""
    if not _in_parts(like):
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def _in_parts(tensor: Tensor) -> bool:
    # Not every build of torch has torch.distributed, where DTensor is.
    return hasattr(tensor, "full_tensor")
