"""Many devices, on torch.distributed: attention over a sharded sequence, and tensor parallelism.

DDP and FSDP2 (``fully_shard``) need nothing from here. docs/parallel.md shows each in use.
"""

from fusedformer.integrations.ring import ring_attention
from fusedformer.integrations.sequence import gather_sequence, shard_sequence
from fusedformer.integrations.tensor_parallel import HeadwiseParallel, tensor_parallel_plan
from fusedformer.integrations.ulysses import ulysses_attention

__all__ = [
    "HeadwiseParallel",
    "gather_sequence",
    "ring_attention",
    "shard_sequence",
    "tensor_parallel_plan",
    "ulysses_attention",
]
