"""All ops that can be measured, by name."""

from fusedformer.benchmarks.ops import activation, attention, cross_entropy, layer_norm
from fusedformer.benchmarks.ops.common import Op

OPS: dict[str, Op] = {
    op.name: op for op in (attention.OP, *layer_norm.OPS, *activation.OPS, *cross_entropy.OPS)
}
