"""The Transformer's layers and stacks beside torch's, on the same parameters, option by option."""

import functools

import pytest
import torch
from backends import BACKENDS
from nn_cases import assert_agree, assert_all_within_bound, outputs_and_gradients, twins
from pairwise import pairwise
from torch import Tensor
from torch.nn import functional

import fusedformer

pytestmark = [
    pytest.mark.usefixtures("on_device"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),  # torch's, both
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]

nn = fusedformer.nn

OPTIONS = {
    "dtype": [torch.float32, torch.bfloat16],
    "layout": ["batch first", "batch second", "no batch"],
    "norm_first": [False, True],
    "activation": [
        "relu",
        "gelu",
        torch.nn.GELU("tanh"),
        torch.nn.ReLU(),
        functional.silu,
        torch.tanh,  # not fused
    ],
    "bias": [True, False],
    "mask": [None, "causal", "float", "bool by head"],
    "padding": [None, "bool", "float"],
    "training": [True, False],
}

CASES = pairwise(OPTIONS)
WIDTH, HIDDEN, HEADS, BATCH, LENGTH, SOURCE = 64, 80, 4, 3, 37, 43


def describe(case: dict) -> str:
    return " ".join(str(value).replace("torch.", "").split(" at ")[0] for value in case.values())


def make(cls: type, case: dict) -> torch.nn.Module:
    activation = case["activation"]
    if case["dtype"] == torch.bfloat16 and activation in ("relu", OPTIONS["activation"][3]):
        # Its derivative jumps, so that no bound of rounding errors holds for its gradients.
        activation = "gelu"
    return cls(
        WIDTH, HEADS, HIDDEN, dropout=0.0, activation=activation, layer_norm_eps=1e-3,
        batch_first=case["layout"] == "batch first", norm_first=case["norm_first"],
        bias=case["bias"],
    )  # fmt: skip


def rows(case: dict, length: int) -> Tensor:
    x = torch.randn(BATCH, length, WIDTH, dtype=case["dtype"])
    if case["layout"] == "no batch":
        return x[0]
    return x if case["layout"] == "batch first" else x.transpose(0, 1)


def make_masks(case: dict, keys: int) -> dict[str, Tensor]:
    """mask and padding, those of them that the case has, for attention to so many keys."""
    batch = 1 if case["layout"] == "no batch" else BATCH
    found = {}
    if case["mask"]:
        shape = (batch * HEADS, LENGTH, keys) if "head" in case["mask"] else (LENGTH, keys)
        hidden = torch.rand(shape) > 0.6
        hidden[..., :2] = False  # torch gives NaN where nothing is left
        if case["mask"] == "causal":
            hidden = torch.ones(shape, dtype=torch.bool).triu(1)
        if case["mask"] == "float":
            hidden = torch.randn(shape, dtype=case["dtype"]).masked_fill(hidden, -torch.inf)
        found["mask"] = hidden
    if case["padding"]:
        hidden = torch.arange(keys) >= torch.tensor([9, keys, 3])[:batch, None]
        if case["padding"] == "float":
            hidden = torch.zeros(hidden.shape, dtype=case["dtype"]).masked_fill(hidden, -torch.inf)
        found["padding"] = hidden[0] if case["layout"] == "no batch" else hidden
    return found


def layers(name: str, case: dict) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch's of that name."""
    ours, theirs = (make(getattr(m, name), case).train(case["training"]) for m in (nn, torch.nn))
    return twins(ours, theirs, case["dtype"])


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_encoder_layer(case):
    ours, theirs = layers("TransformerEncoderLayer", case)

    def call(layer, x, mask=None, padding=None):
        return layer(x, mask, padding, is_causal=case["mask"] == "causal")

    inputs = {"x": rows(case, LENGTH), **make_masks(case, LENGTH)}
    assert_agree(ours, theirs, call, inputs, terms=1.0)


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_decoder_layer(case):
    ours, theirs = layers("TransformerDecoderLayer", case)

    def call(layer, x, memory, mask=None, padding=None, memory_mask=None, memory_padding=None):
        return layer(
            x, memory, mask, memory_mask, padding, memory_padding,
            tgt_is_causal=case["mask"] == "causal",
        )  # fmt: skip

    inputs = {"x": rows(case, LENGTH), "memory": rows(case, SOURCE), **make_masks(case, LENGTH)}
    inputs |= {f"memory_{name}": mask for name, mask in make_masks(case, SOURCE).items()}
    assert_agree(ours, theirs, call, inputs, terms=1.0)


# --- Dropout --------------------------------------------------------------------------------------

# Where torch's layers drop and where ours do: sums in the norm that follows, if one does.
PLACES = [
    ("Encoder", False, "self_attn.dropout", "self_attn.dropout"),
    ("Encoder", False, "dropout.p", "dropout.p"),
    ("Encoder", False, "dropout1.p", "norm1.p"),
    ("Encoder", False, "dropout2.p", "norm2.p"),
    ("Encoder", True, "self_attn.dropout", "self_attn.dropout"),
    ("Encoder", True, "dropout.p", "dropout.p"),
    ("Encoder", True, "dropout1.p", "norm2.p"),
    ("Encoder", True, "dropout2.p", "dropout2.p"),
    ("Decoder", False, "multihead_attn.dropout", "multihead_attn.dropout"),
    ("Decoder", False, "dropout1.p", "norm1.p"),
    ("Decoder", False, "dropout2.p", "norm2.p"),
    ("Decoder", False, "dropout3.p", "norm3.p"),
    ("Decoder", True, "dropout1.p", "norm2.p"),
    ("Decoder", True, "dropout2.p", "norm3.p"),
    ("Decoder", True, "dropout3.p", "dropout3.p"),
]


def set_attribute(module: torch.nn.Module, path: str, value: float) -> None:
    *parents, name = path.split(".")
    parent = functools.reduce(getattr, parents, module)
    assert hasattr(parent, name)
    setattr(parent, name, value)


@pytest.mark.parametrize(("kind", "norm_first", "their_path", "our_path"), PLACES)
@pytest.mark.parametrize("activation", ["gelu", torch.tanh])
def test_dropout_is_where_torchs_is(kind, norm_first, their_path, our_path, activation):
    """At p = 1 it is no matter of chance what a place of dropout does."""
    case = {k: v[0] for k, v in OPTIONS.items()}
    case |= {"norm_first": norm_first, "activation": activation}
    ours, theirs = layers(f"Transformer{kind}Layer", case)
    set_attribute(ours, our_path, 1.0)
    set_attribute(theirs, their_path, 1.0)
    inputs = {"x": rows(case, LENGTH)} | ({"memory": rows(case, SOURCE)} if kind[0] == "D" else {})

    def call(layer, **inputs):
        return layer(*inputs.values())

    dropped = call(ours, **inputs)
    assert_agree(ours, theirs, call, inputs, terms=1.0)
    set_attribute(ours, our_path, 0.0)
    assert not torch.equal(call(ours, **inputs), dropped)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_dropout_drops_the_same_on_every_backend(backend, norm_first):
    """Under one seed of torch's generator; the truth is the reference in float64."""
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, 0.3, "gelu", norm_first=norm_first)
    inputs = {"x": torch.randn(17, 1, WIDTH), "memory": torch.randn(19, 1, WIDTH)}

    def run(backend, dtype):
        def call(layer, x, memory):
            torch.manual_seed(5)
            return layer(x, memory, tgt_is_causal=True)

        with fusedformer.use_backend(backend):
            return outputs_and_gradients(
                layer.to(dtype), call, {k: v.to(dtype) for k, v in inputs.items()}
            )

    truth, eager = run("reference", torch.float64), run("reference", torch.float32)
    actual = run(backend, torch.float32)
    assert_all_within_bound(actual, eager, truth, terms=1.0)


def test_modules_in_eval_drop_nothing():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.5, norm_first=True).eval()
    x = torch.randn(LENGTH, 2, WIDTH)
    before = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), before)


# --- Stacks ---------------------------------------------------------------------------------------


def transformer(module, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return module.Transformer(
        WIDTH, HEADS, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=HIDDEN,
        dropout=0.0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "batch_first": True, "bias": False}])
def test_transformer(options):
    ours, theirs = transformer(nn, **options), transformer(torch.nn, **options)
    # The same names and, from the same seed, the same parameters.
    for (name, mine), (torchs, value) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == torchs
        assert torch.equal(mine, value), name
    ours, theirs = twins(ours, theirs, torch.float32)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    padding = torch.arange(LENGTH)[None] >= torch.full((LENGTH, 1), 30)

    def call(model, source, target):
        return model(source, target, tgt_mask=mask.to(source.dtype), src_key_padding_mask=padding)

    inputs = {name: torch.randn(LENGTH, LENGTH, WIDTH) for name in ("source", "target")}
    assert_agree(ours, theirs, call, inputs, terms=1.0)


def test_stacks_take_any_layer_and_no_norm():
    for name in ("TransformerEncoder", "TransformerDecoder"):
        theirs = getattr(torch.nn, name + "Layer")(WIDTH, HEADS, HIDDEN, 0.0)
        stack = getattr(nn, name)(theirs, 2)
        x = torch.randn(LENGTH, 2, WIDTH)
        args = (x, x) if "Decoder" in name else (x,)
        expected = theirs(theirs(*args), *args[1:])
        torch.testing.assert_close(stack(*args), expected)


@pytest.mark.parametrize("kind", ["float", "bool"])
def test_a_causal_mask_is_recognised(kind):
    """And only that: a hint of is_causal lets attention ignore what the mask says."""
    seen = []

    class Layer(torch.nn.Module):
        def forward(self, x, src_mask, src_key_padding_mask, is_causal):
            seen.append(is_causal)
            return x

    stack = nn.TransformerEncoder(Layer(), 1)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    almost = causal.clone()
    almost[0, 1] = 0
    masks = [causal, almost, causal[:4], causal.expand(2, 5, 5)]
    for mask in masks if kind == "float" else [mask < 0 for mask in masks]:
        stack(torch.randn(5, 2, 4), mask)
    assert seen == [True, False, False, False]
    stack(torch.randn(5, 2, 4), causal, is_causal=False)
    stack(torch.randn(5, 2, 4), is_causal=True)
    assert seen[4:] == [False, True]


# --- What may have been done to a layer -----------------------------------------------------------


def test_hooks_of_linear1_are_called():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, "gelu")
    x = torch.randn(LENGTH, 2, WIDTH)
    expected, seen = layer(x), []
    layer.linear1.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    torch.testing.assert_close(layer(x), expected)
    assert seen == [(LENGTH, 2, HIDDEN)]


def test_a_linear1_of_another_class_is_called():
    class Doubled(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, "gelu")
    theirs = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, "gelu")
    theirs.load_state_dict(layer.state_dict())
    for one in (layer, theirs):
        one.linear1.__class__ = Doubled
    x = torch.randn(LENGTH, 2, WIDTH)
    torch.testing.assert_close(layer(x), theirs(x))


def test_relu_sees_the_sum_with_the_bias_unrounded():
    """In 16 bits: a rounded product plus a bias may have another sign, and ReLU another slope."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, "relu", dtype=torch.bfloat16)
    x = torch.randn(LENGTH, 50, WIDTH, dtype=torch.bfloat16)
    expected = layer.linear2(torch.relu(layer.linear1(x)))
    assert torch.equal(layer._feed_forward(x), expected)


def test_an_activation_may_be_changed():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, "gelu").eval()
    theirs = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, "gelu")
    theirs.load_state_dict(layer.state_dict())
    for one in (layer, theirs):
        one.activation = torch.tanh
    x = torch.randn(LENGTH, 2, WIDTH)
    torch.testing.assert_close(layer(x), theirs(x))


def test_errors():
    with pytest.raises(ValueError, match=r"activation must be .* a callable; got 'x'"):
        nn.TransformerEncoderLayer(8, 2, activation="x")
