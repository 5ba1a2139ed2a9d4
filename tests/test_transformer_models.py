"""What holds for every model of transformer/: sizes, options, training, torch's tools."""

import copy
import pickle

import pytest
import torch
from model_cases import IMAGES, MODELS, TOKENS, randomize, seq2seq
from torch.utils._python_dispatch import TorchDispatchMode

from fusedformer import (
    BERT,
    GPT,
    BERTConfig,
    GPTConfig,
    Transformer,
    TransformerConfig,
    ViT,
    ViTConfig,
    layer_norm,
)

KINDS = list(MODELS)

# The counts that are published with the checkpoints (BERT: with both of its heads).
COUNTS = [
    (GPT, GPTConfig, "small", 124_439_808),
    (GPT, GPTConfig, "medium", 354_823_168),
    (GPT, GPTConfig, "large", 774_030_080),
    (GPT, GPTConfig, "xl", 1_557_611_200),
    (BERT, BERTConfig, "base", 110_106_428),
    (BERT, BERTConfig, "large", 336_226_108),
    (ViT, ViTConfig, "tiny", 5_717_416),
    (ViT, ViTConfig, "small", 22_050_664),
    (ViT, ViTConfig, "base", 86_567_656),
    (ViT, ViTConfig, "large", 304_326_632),
]


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("model", "config", "preset", "published"), COUNTS)
def test_parameter_counts(model, config, preset, published):
    with torch.device("meta"):
        assert count(model(config.preset(preset))) == published


@pytest.mark.parametrize(("preset", "millions"), [("base", 65), ("big", 213)])
def test_parameter_counts_of_the_paper(preset, millions):
    """torch.nn.Transformer's but its two final norms, and one matrix of embeddings."""
    config = TransformerConfig.preset(preset)
    with torch.device("meta"):
        found = count(Transformer(config))
        layers = torch.nn.Transformer(
            config.d_model, config.heads, config.layers, config.layers, config.d_ff,
            batch_first=True,
        )  # fmt: skip
    assert found == count(layers) - 4 * config.d_model + config.vocab_size * config.d_model
    # Table 3, rounded there, of a vocabulary of "about 37000 tokens".
    assert found == pytest.approx(millions * 1e6, rel=0.05)


def test_bert_without_its_heads():
    with torch.device("meta"):
        model = BERT(BERTConfig.preset("base"))
    parts = (
        model.token_embedding, model.position_embedding, model.segment_embedding,
        model.embedding_norm, model.encoder, model.pooler,
    )  # fmt: skip
    assert sum(count(part) for part in parts) == 109_482_240


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "GPTConfig: d_model must be a multiple of heads; got 768 and 5"),
        ({"layers": 0}, "GPTConfig: layers must be an int, 1 or more; got 0"),
        ({"d_ff": 1.5}, "GPTConfig: d_ff must be an int, 1 or more; got 1.5"),
        ({"dropout": 1.5}, "GPTConfig: dropout must be from 0 to 1; got 1.5"),
        ({"activation": "tanh"}, "GPTConfig: activation must be one of .*; got 'tanh'"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**change)


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset must be one of base, big; got 'huge'"):
        TransformerConfig.preset("huge")
    assert TransformerConfig.preset("big", dropout=0.1).dropout == 0.1


def test_initial_sizes():
    """GPT-2's rule: N(0, 0.02), less by sqrt(2 layers) for what adds to the residual stream."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, max_length=64, d_model=128, layers=8, heads=4, d_ff=512))
    layer = model.stack.layers[3]
    for weight, std in (
        (model.token_embedding.weight, 0.02),
        (layer.self_attention.in_proj_weight, 0.02),
        (layer.feed_forward.linear1.weight, 0.02),
        (layer.self_attention.out_proj.weight, 0.005),
        (layer.feed_forward.linear2.weight, 0.005),
    ):
        # Five standard errors of a standard deviation.
        assert abs(weight.std() / std - 1) < 5 / (2 * weight.numel()) ** 0.5
    assert not layer.self_attention.in_proj_bias.any()
    assert torch.equal(layer.norm1.weight, torch.ones(128))
    # Embeddings of the encoder-decoder: of variance 1 once they are scaled by sqrt(d_model).
    embedding = seq2seq(vocab_size=500, d_model=128).target_embedding.weight
    assert abs(embedding.std() * 128**0.5 - 1) < 5 / (2 * embedding.numel()) ** 0.5


# --- Options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_layers(kind, prenorm):
    """One layer's parameters; the same as a model whose layers hold equal ones."""
    make, output, _ = MODELS[kind]
    shared = randomize(make(share_layers=True, prenorm=prenorm, layers=3)).eval()
    alike = make(prenorm=prenorm, layers=3).eval()
    state = shared.state_dict()
    for name in alike.state_dict():
        stack, _, rest = name.partition(".layers.")
        if rest:
            state[name] = state[f"{stack}.layers.0.{rest.partition('.')[2]}"]
    alike.load_state_dict(state)
    assert torch.equal(output(shared), output(alike))
    per_layer = sum(p.numel() for name, p in alike.named_parameters() if ".layers.0." in name)
    assert count(alike) - count(shared) == 2 * per_layer


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states(kind, prenorm):
    """The residual stream after each layer; the last, normed in pre-norm, is the stack's output."""
    model = MODELS[kind][0](prenorm=prenorm)  # with dropout: they are those of the very same pass
    inputs = (IMAGES,) if kind == "vit" else (TOKENS, TOKENS) if kind == "seq2seq" else (TOKENS,)
    outputs = {}
    stacks = [module for module in model.modules() if type(module).__name__ == "Stack"]
    for stack in stacks:
        stack.register_forward_hook(lambda stack, args, output: outputs.update({stack: output}))
    states = model(*inputs, hidden_states=True)[1]
    for stack, found in zip(stacks, states if kind == "seq2seq" else [states], strict=True):
        assert len(found) == 2
        last = stack.layers[-1]
        norm = (last.norm3 if hasattr(last, "norm3") else last.norm2) if prenorm else None
        if norm is None:
            assert torch.equal(found[-1], outputs[stack])
        else:
            normed = layer_norm(found[-1], norm.weight, norm.bias, norm.eps)
            assert torch.equal(normed, outputs[stack])


# --- Dropout and training -------------------------------------------------------------------------


class Rates(TorchDispatchMode):
    """The dropout probability of every call of an op that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[float]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [argument.name for argument in func._schema.arguments]
        name = func._schema.name.removeprefix("fusedformer::").removesuffix("_fwd")
        label = next((n for n in ("dropout_p", "p") if n in names), None)
        if func.namespace == "fusedformer" and label and not name.endswith("_bwd"):
            self.found.setdefault(name, []).append(args[names.index(label)])
        return func(*args, **(kwargs or {}))


# attention, add + norm, dropout alone: how many of each drop. An encoder's layer has one attention
# and two sublayers' outputs, a decoder's two and three. Embeddings are dropped by themselves in
# post-norm; in pre-norm with the first norm. BERT's second loss has one before its classifier.
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("seq2seq", (2 + 4, 4 + 6, 2)),
        ("gpt", (2, 4 + 1, 0)),
        ("bert", (2, 4, 1)),
        ("vit", (2, 4 + 1, 0)),
    ],
)
def test_dropout_is_where_the_paper_has_it(kind, expected):
    make, _, loss = MODELS[kind]
    model = make()
    for training, rate in ((True, 0.1), (False, 0.0)):
        model.train(training)
        with Rates() as rates:
            loss(model)
        counts = tuple(
            sum(p == rate and rate > 0 for p in rates.found.get(op, []))
            for op in ("attention", "dropout_add_layer_norm", "dropout")
        )
        assert counts == (expected if training else (0, 0, 0)), rates.found
        assert not any(rates.found["bias_activation"])  # none there


def train(model: torch.nn.Module, loss, seed: int) -> list[float]:
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_repeatable(kind):
    make, _, loss = MODELS[kind]
    model = make()
    runs = [train(copy.deepcopy(model), loss, seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0][-1] < runs[0][0] * 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind):
    make, _, loss = MODELS[kind]
    model = make(share_embeddings=False) if kind == "seq2seq" else make()
    loss(model).backward()
    if kind == "bert":
        model.classification_loss(
            torch.ones(2, 3, dtype=torch.int64), torch.tensor([0, 1]), torch.ones(2, 3).long()
        ).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


# --- torch's tools --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind):
    make, output, _ = MODELS[kind]
    model = randomize(make()).eval()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(again), output(model))


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_meta_device(kind):
    """As a sharded model is made: no memory at first, then initialised where it lies."""
    make, output, _ = MODELS[kind]
    torch.manual_seed(3)
    expected = make().eval()
    with torch.device("meta"):
        model = make().eval()
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.init_weights()
    torch.manual_seed(3)
    expected.init_weights()
    assert not list(model.buffers())  # to_empty would leave them without their values
    assert torch.equal(output(model), output(expected))


@pytest.mark.parametrize(
    "kind", ["gpt", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "gpt")]
)
def test_compiles_whole(kind, fresh_compiler):
    make, _, loss = MODELS[kind]
    model = randomize(make())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = []
    for run in (loss, compiled):
        model.zero_grad()
        torch.manual_seed(5)
        value = run(model)
        value.backward()
        found.append([value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
