"""Tensor parallelism for our modules, through torch's parallelize_module (Shoeybi et al.,
"Megatron-LM", 2019): heads and the hidden units of feed-forward nets are divided among devices."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
)

from fusedformer.nn import MultiheadAttention, TransformerDecoderLayer, TransformerEncoderLayer
from fusedformer.transformer.layers import FeedForward


class HeadwiseParallel(ParallelStyle):
    """A parallel style for MultiheadAttention: every device has some of the heads.

    Input and output are the same on all devices (an input may also be a DTensor, placed in any
    way). Dropout drops what it would without sharding. The packed ``in_proj_weight`` becomes
    ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``, so a checkpoint is loaded before.

    Raises (in parallelize_module):
        TypeError: the module is not a MultiheadAttention of fusedformer.nn.
        ValueError: heads that the mesh does not divide, a mesh of two dimensions, add_bias_kv or
            add_zero_attn.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, MultiheadAttention):
            raise TypeError(
                "HeadwiseParallel: module must be a fusedformer.nn.MultiheadAttention; "
                f"got {type(module).__name__}"
            )
        if device_mesh.ndim != 1 or module.num_heads % device_mesh.size():
            raise ValueError(
                "HeadwiseParallel: the mesh must have one dimension that divides the heads, "
                f"{module.num_heads}; got {tuple(device_mesh.shape)}"
            )
        if module.bias_k is not None or module.add_zero_attn:
            raise ValueError("HeadwiseParallel: add_bias_kv and add_zero_attn are not supported")
        weights: list[Any] = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        if module.in_proj_weight is not None:
            weights = list(module.in_proj_weight.chunk(3))
            module.register_parameter("in_proj_weight", None)
        for name, weight in zip("qkv", weights, strict=True):
            self._distribute(module, f"{name}_proj_weight", weight, device_mesh, Shard(0))
        if module.in_proj_bias is not None:
            self._distribute(module, "in_proj_bias", module.in_proj_bias, device_mesh, Replicate())
        RowwiseParallel()._apply(module.out_proj, device_mesh)
        module.register_forward_pre_hook(_Inputs(device_mesh), with_kwargs=True)
        return module

    def _distribute(
        self, module: nn.Module, name: str, tensor: Tensor, mesh: DeviceMesh, placement: Any
    ) -> None:
        sharded = distribute_tensor(
            tensor.detach(), mesh, [placement], src_data_rank=self.src_data_rank
        )
        module.register_parameter(name, nn.Parameter(sharded, tensor.requires_grad))


class _Inputs:
    """A forward pre-hook: what MultiheadAttention is called with, as DTensors."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        names = ("query", "key", "value", "key_padding_mask", "need_weights")
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("need_weights", True) or given.get("cache") is not None:
            raise ValueError(
                "MultiheadAttention: with its heads on several devices, need_weights must be "
                "False and cache None"
            )
        # The same tensor three times stays so: its gradients are then summed up in one go.
        tensors = {id(given[name]): given[name] for name in names[:3]}
        replicated = {key: self._replicated(tensor) for key, tensor in tensors.items()}
        args = tuple(replicated.get(id(x), x) for x in args)
        kwargs = {name: replicated.get(id(x), x) for name, x in kwargs.items()}
        if kwargs.get("rotary") is not None:
            kwargs["rotary"] = _locally(kwargs["rotary"])
        return args, kwargs

    def _replicated(self, tensor: Any) -> Any:
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, self.mesh, [Replicate()], run_check=False)
        return tensor.redistribute(placements=[Replicate()])


def _locally(rotary: Any) -> Any:
    """Rotary positions of DTensors: they are the same for every head."""

    def turn(*heads: DTensor) -> tuple[DTensor, ...]:
        turned = rotary(*(x.to_local() for x in heads))
        return tuple(
            DTensor.from_local(x, of.device_mesh, of.placements, run_check=False)
            for x, of in zip(turned, heads, strict=True)
        )

    return turn


def tensor_parallel_plan(model: nn.Module) -> "dict[str, ParallelStyle]":
    """The plan for ``parallelize_module(model, mesh, plan)`` that divides every layer of a model.

    Heads of each MultiheadAttention, hidden units of each feed-forward net; embeddings, norms, the
    output layer and activations between sublayers are whole on every device. Seed torch's
    generators alike on all of them, as for any tensor parallelism.

    Args:
        model: GPT, BERT, ViT, Transformer, or anything built of their layers or of the layers of
            fusedformer.nn.

    Raises:
        ValueError: there is no such layer in it.
    """
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, MultiheadAttention):
            plan[name] = HeadwiseParallel()
        elif isinstance(module, FeedForward):
            whole = (Replicate(),)
            plan[name] = PrepareModuleInput(input_layouts=whole, desired_input_layouts=whole)
        elif not isinstance(module, (TransformerEncoderLayer, TransformerDecoderLayer)):
            continue
        if not isinstance(module, MultiheadAttention):
            # DTensors between the two: dropout there must not be the same on all devices.
            plan[f"{prefix}linear1"] = ColwiseParallel(use_local_output=False)
            plan[f"{prefix}linear2"] = RowwiseParallel()
    if not plan:
        raise ValueError(
            "tensor_parallel_plan: model has no MultiheadAttention, FeedForward or Transformer "
            f"layer of fusedformer; got {type(model).__name__}"
        )
    return plan
