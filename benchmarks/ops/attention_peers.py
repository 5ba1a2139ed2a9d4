"""Attention of other packages, each called as its documentation says; (B, H, N, D) in and out."""

from fusedformer.benchmarks.ops.common import Impl

IMPLS: dict[str, Impl] = {}
