"""Models on several devices against one: DDP, FSDP2, tensor parallelism."""

import copy

import pytest
import torch
import torch.distributed as dist
from nn_cases import assert_all_within_bound
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fusedformer import GPT, GPTConfig, Transformer, TransformerConfig, nn
from fusedformer.integrations.parallel import HeadwiseParallel, tensor_parallel_plan

SIZES = {"vocab_size": 50, "max_length": 40, "d_model": 32, "heads": 4, "d_ff": 64}


def gpt(**options):
    torch.manual_seed(0)
    return GPT(GPTConfig(**SIZES, layers=2, **options))


def transformer():
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**SIZES, layers=2))


def batch(model):
    """Arguments of model.loss() for four sequences."""
    torch.manual_seed(1)
    tokens = torch.randint(50, (4, 33))
    lengths = torch.tensor([33, 20, 9, 33])
    if isinstance(model, GPT):
        return tokens, lengths
    return tokens, torch.randint(50, (4, 17)), lengths, torch.tensor([17, 3, 17, 8])


def part(inputs, rank, size):
    return [x.chunk(size)[rank] for x in inputs]


class Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model.loss(*inputs)


def whole(x):
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def step(model, loss):
    """By name: the gradients of a loss, and the parameters after a step against them."""
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    found = {}
    for name, parameter in model.named_parameters():
        found[f"gradient of {name}"] = whole(parameter.grad)
        found[f"output {name} after the step"] = whole(parameter)
    return found


def one_process(model, size):
    """A step on the mean of what ``size`` processes have as their losses."""
    model = copy.deepcopy(model)
    inputs, losses = batch(model), []
    for rank in range(size):
        torch.manual_seed(rank)
        losses.append(model.loss(*part(inputs, rank, size)))
    found = step(model, sum(losses) / size)
    return found | {f"output {rank}": loss.detach() for rank, loss in enumerate(losses)}


def everyones(tensor):
    """What each process has, by name."""
    tensors = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(tensors, tensor.detach())
    return {f"output {rank}": tensor for rank, tensor in enumerate(tensors)}


def check_ddp_and_fsdp():
    rank, size = dist.get_rank(), dist.get_world_size()
    for model in (gpt(), transformer()):
        eager, truth = one_process(model, size), one_process(copy.deepcopy(model).double(), size)
        own = part(batch(model), rank, size)
        for kind in ("ddp", "fsdp", "fsdp of loss()"):
            ours = copy.deepcopy(model)
            loss = Loss(ours)
            call = loss
            if kind == "ddp":
                call = DistributedDataParallel(loss)
            else:
                for module in ours.modules():
                    if isinstance(module, torch.nn.ModuleList):
                        for layer in module:
                            fully_shard(layer)
                fully_shard(loss if kind == "fsdp" else ours)
                if kind != "fsdp":
                    register_fsdp_forward_method(ours, "loss")
                    call = ours.loss
            torch.manual_seed(rank)
            value = call(*own)
            actual = step(ours, value) | everyones(value)
            assert_all_within_bound(actual, eager, truth, 1.0)


@pytest.mark.slow
def test_ddp_and_fsdp_of_models(processes):
    processes.run(2, check_ddp_and_fsdp)


def split_heads(model):
    """The parameters of in_proj_weight as tensor parallelism has them: three."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            for name, weight in zip("qkv", module.in_proj_weight.chunk(3), strict=True):
                weight = torch.nn.Parameter(weight.detach().clone())
                module.register_parameter(f"{name}_proj_weight", weight)
            module.register_parameter("in_proj_weight", None)
    return model


def check_tensor_parallel(models, size):
    mesh = init_device_mesh("cpu", (size,))
    for make, inputs in models:
        ours = make()
        ours = parallelize_module(ours, mesh, tensor_parallel_plan(ours))
        results = []
        for model in (ours, split_heads(make()), split_heads(make()).double()):
            torch.manual_seed(5)
            dtype = next(model.parameters()).dtype
            given = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
            out = model(*given)
            upstream = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape).sin()
            results.append(step(model, (out * upstream).mean()) | {"output": out.detach()})
        assert_all_within_bound(*results, 1.0)
    layer = encoder_layer(0.3)
    layer = parallelize_module(layer, mesh, tensor_parallel_plan(layer))
    torch.manual_seed(7)  # alike in all: what is whole stays the same everywhere
    out = layer(torch.randn(2, 20, 32))
    assert all(torch.equal(one, out) for one in everyones(out).values())


def encoder_layer(dropout=0.0, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout, batch_first=True, **options)
    layer.self_attn.dropout = 0.3  # which is exact, whatever the sharding
    return layer


def decoder_layer():
    torch.manual_seed(0)
    return nn.TransformerDecoderLayer(32, 4, 64, 0.0)


def attention_dropout_alone(model):
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.3
    return model


def exact_gpt(**options):
    return attention_dropout_alone(gpt(dropout=0.0, **options))


def pre_norm_layer():
    return encoder_layer(norm_first=True, activation="gelu")


def rotary_gpt():
    return exact_gpt(rotary=True)


def tensor_parallel_models():
    torch.manual_seed(1)
    tokens = torch.randint(50, (2, 33)), torch.tensor([33, 12])
    x = torch.randn(2, 20, 32)
    return [
        (encoder_layer, (x,)),
        (pre_norm_layer, (x,)),
        (decoder_layer, (x, torch.randn(7, 20, 32))),
        (exact_gpt, tokens),
        (rotary_gpt, tokens),
    ]


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (torch.nn.MultiheadAttention(8, 2), TypeError, "must be a fusedformer.nn.MultiheadAtt"),
        (nn.MultiheadAttention(8, 2, add_zero_attn=True), ValueError, "are not supported"),
    ],
)
def test_heads_that_cannot_be_divided(alone, module, error, message):
    mesh = init_device_mesh("cpu", (1,))
    with pytest.raises(error, match=message):
        parallelize_module(module, mesh, HeadwiseParallel())


def test_a_call_that_heads_on_several_devices_cannot_take(alone):
    mesh = init_device_mesh("cpu", (1,))
    attention = parallelize_module(nn.MultiheadAttention(8, 2), mesh, HeadwiseParallel())
    x = torch.randn(5, 1, 8)
    with pytest.raises(ValueError, match="need_weights must be False and cache None"):
        attention(x, x, x)


def test_a_model_without_layers_of_ours():
    with pytest.raises(ValueError, match=r"no MultiheadAttention.*; got Linear"):
        tensor_parallel_plan(torch.nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_models(processes, size):
    processes.run(size, check_tensor_parallel, tensor_parallel_models(), size)
