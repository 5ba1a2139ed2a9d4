"""All ops that can be measured, by name."""

from fusedformer.benchmarks.ops import activation, attention, cross_entropy, layer_norm, models
from fusedformer.benchmarks.ops.common import Op

_ALL = (attention.OP, *layer_norm.OPS, *activation.OPS, *cross_entropy.OPS, *models.OPS)
OPS: dict[str, Op] = {op.name: op for op in _ALL}
