"""fuse() and sdpa() on models of other libraries: as they come, but for random weights."""

import contextlib
import copy
import pickle
from collections import Counter

import pytest
import torch
from backends import BACKENDS
from bounds import assert_within_bound
from third_party import (
    MODELS,
    SDPA_MODELS,
    cast,
    gradients,
    in_several_draws,
    output,
    padding,
)
from torch.nn.modules.module import register_module_forward_hook

import fusedformer
from fusedformer import fuse, unfuse, use_backend

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="there is no C++ library here")

# What is fused, by class; with dropout 0.1. Norms of these widths are left on a CPU.
FUSED = {
    "gpt2": {"GPT2LMHeadModel": 1, "NewGELUActivation": 2, "Dropout": 5},
    "bert": {"BertForMaskedLM": 1, "BertSelfOutput": 2, "BertOutput": 2, "Dropout": 1},
    "vit": {"ViTForImageClassification": 1, "Dropout": 3},
    "llama": {"LlamaForCausalLM": 1, "LlamaRMSNorm": 5},
    "mistral": {"MistralForCausalLM": 1, "MistralRMSNorm": 5},
    "t5": {"T5ForConditionalGeneration": 1, "T5LayerNorm": 12, "Dropout": 16},
    "bart": {"BartForConditionalGeneration": 1},
    "whisper": {"WhisperEncoder": 1},
    "torch_transformer": {
        "TransformerEncoderLayer": 2,
        "TransformerDecoderLayer": 2,
        "MultiheadAttention": 6,
        "TransformerEncoder": 1,
    },
    "x_transformers": {"Dropout": 5},
    "timm_vit": {"Dropout": 8},
    "timm_deit": {"Dropout": 8},
    "timm_swin": {"Dropout": 16},
}
LEFT = ("fewer than 512 features", "p is 0", "a class of its own", "a class that is not known")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


@contextlib.contextmanager
def switched(name):
    """Within, the attention of models that fuse() cannot reach is ours, too: all of it."""
    if name not in SDPA_MODELS:
        yield
        return
    with fusedformer.sdpa() as switch:
        yield
    assert switch.fused + switch.compiled["fused"] > 0
    assert not switch.left


def make(name, dropout=0.0):
    """The model, the same one fused, inputs."""
    model, inputs = MODELS[name](dropout)
    fused = copy.deepcopy(model)
    fuse(fused)
    return model, fused, inputs


def exact(model, inputs):
    return output(copy.deepcopy(model).double(), cast(inputs, torch.float64))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_fused(name):
    model, inputs = MODELS[name](0.1)
    report = fuse(model)
    assert Counter(entry.kind for entry in report.fused) == FUSED[name]
    for entry in report.left:
        assert any(reason in entry.why for reason in LEFT), entry
    called = set()
    hook = register_module_forward_hook(lambda module, args, result: called.add(module))
    try:
        output(model.train(), inputs)
    finally:
        hook.remove()
    idle = {entry.name for entry in report.fused if model.get_submodule(entry.name) not in called}
    # Which of two ways attention takes in these libraries is not known before it is called.
    known = {"attn_drop", "attn_dropout"} if name in SDPA_MODELS else set()
    assert {entry.rpartition(".")[2] for entry in idle} <= known


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name, dtype):
    def run():
        model, fused, inputs = make(name)
        logits, grads = [], []
        for one, of in ((fused, dtype), (model, dtype), (model, torch.float64)):
            ours, one = one is fused, copy.deepcopy(one).to(of)
            with switched(name) if ours else contextlib.nullcontext():
                logits.append(output(one, cast(inputs, of)))
                grads.append(gradients(one, logits[-1]))
        return {"logits": logits, "gradients": grads}

    for label, values in in_several_draws(run).items():
        assert_within_bound(label, *values)


@pytest.mark.parametrize("name", MODELS)
def test_state_goes_back_into_the_original(name):
    model, fused, inputs = make(name, dropout=0.1)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.mul_(0.9)
    expected = output(fused, inputs)
    # x-transformers' own cannot be pickled.
    plain = name in SDPA_MODELS
    copied = copy.deepcopy(fused) if plain else pickle.loads(pickle.dumps(fused))
    assert torch.equal(output(copied, inputs), expected)
    model.load_state_dict(fused.state_dict())
    unfuse(fused)
    unfuse(copied)
    for one in (fused, copied):
        assert torch.equal(output(one, inputs), output(model, inputs))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_generate(name):
    model, fused, inputs = make(name)
    inputs.pop("decoder_input_ids", None)
    inputs["attention_mask"] = padding(left=name in ("gpt2", "llama"))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 2}
    assert torch.equal(fused.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_that_of_the_reference(name):
    _, model, inputs = make(name, dropout=0.2)
    model.train()
    results = []
    for backend, dtype in (
        ("cpu", torch.float32), ("reference", torch.float32), ("reference", torch.float64)
    ):  # fmt: skip
        torch.manual_seed(7)
        with use_backend(backend), switched(name):
            results.append(output(copy.deepcopy(model).to(dtype), cast(inputs, dtype)))
    assert_within_bound("logits", *results)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mistral"])
def test_compiled(name):
    model, fused, inputs = make(name)
    fullgraph = name != "x_transformers"  # which breaks the graph by itself
    with switched(name):
        compiled = output(torch.compile(fused, backend="aot_eager", fullgraph=fullgraph), inputs)
    assert_within_bound("logits", compiled, output(fused, inputs), exact(model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_autocast(name):
    model, fused, inputs = make(name)
    with torch.autocast("cpu", torch.bfloat16):
        eager = output(model, inputs)
        with switched(name):
            ours = output(fused, inputs)
            gradients(fused, ours)
    assert ours.dtype == eager.dtype
    assert_within_bound("logits", ours, eager, exact(model, inputs))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "llama", "t5", "bart", "whisper"])
def test_checkpointing(name):
    _, model, inputs = make(name, dropout=0.2)
    model.train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        found.append(gradients(model, output(model, inputs)))
    assert torch.equal(*found)
