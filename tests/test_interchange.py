"""Models beside torch.nn.Transformer and Hugging Face's, on the same weights: outputs, gradients.

Theirs in float64 is the truth, theirs in the dtype is eager's error; see bounds.py.
"""

import copy
import json

import pytest
import torch
from nn_cases import assert_all_within_bound
from torch import Tensor, nn

from fusedformer import BERT, GPT, GPTConfig, Transformer, TransformerConfig, ViT
from fusedformer.transformer import huggingface
from fusedformer.transformer.convert import from_torch, read, to_torch
from fusedformer.transformer.huggingface import load_hf, save_hf
from fusedformer.transformer.layers import sinusoidal_positions

DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = torch.tensor([13, 5, 9])
REAL = torch.arange(13) < LENGTHS[:, None]  # not padding
TOKENS = torch.arange(39).reshape(3, 13) * 7 % 30 + 1  # none is 0, whose embedding BERT's keeps


def randomize(model: nn.Module) -> None:
    """Every parameter at random, so that none can be left out or stand for another."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * max(parameter.shape) ** -0.5)


def results(model: nn.Module, call, gradients=None) -> dict[str, Tensor]:
    """Outputs and the gradients of all parameters; gradients(model): those under our names."""
    model.zero_grad(set_to_none=True)
    outputs = call(model)
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for output in outputs:
        upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        total = total + (output * upstream.to(output.dtype)).double().sum()
    total.backward()
    found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    grads = grads if gradients is None else gradients(model)
    return found | {f"gradient of {name}": grad for name, grad in grads.items()}


def assert_same(ours, theirs, call_ours, call_theirs, gradients, dtype) -> None:
    """gradients(model): those of theirs under our names, so packed as ours."""
    truth = results(copy.deepcopy(theirs).double(), call_theirs, gradients)
    eager = results(theirs.to(dtype), call_theirs, gradients)
    actual = results(ours.to(dtype), call_ours)
    assert_all_within_bound(actual, eager, truth, 0.0)


# --- torch.nn.Transformer -------------------------------------------------------------------------

SEQ2SEQ = {"vocab_size": 31, "d_model": 32, "layers": 2, "heads": 4, "d_ff": 64, "dropout": 0.0}
SOURCE = TOKENS.flip(1)
SOURCE_LENGTHS = torch.tensor([4, 13, 11])


class TorchSeq2Seq(nn.Module):
    """torch.nn.Transformer with what it lacks: embeddings, positions, output layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.transformer = nn.Transformer(
            config.d_model, config.heads, config.layers, config.layers, config.d_ff, 0.0,
            config.activation, layer_norm_eps=config.eps, batch_first=True,
            norm_first=config.prenorm,
        )  # fmt: skip

    def embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        width = x.shape[-1]
        return x * width**0.5 + sinusoidal_positions(torch.arange(13), width).to(x.dtype)

    def forward(self, source: Tensor, target: Tensor, source_lengths, target_lengths) -> Tensor:
        def padding(lengths: Tensor) -> Tensor:
            return torch.arange(13) >= lengths[:, None]

        x = self.transformer(
            self.embed(source), self.embed(target),
            tgt_mask=torch.ones(13, 13, dtype=torch.bool).triu(1),
            src_key_padding_mask=padding(source_lengths),
            memory_key_padding_mask=padding(source_lengths),
            tgt_key_padding_mask=padding(target_lengths),
        )  # fmt: skip
        return nn.functional.linear(x, self.embedding.weight)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("dtype", [*DTYPES, "autocast"], ids=str)
@pytest.mark.parametrize(("prenorm", "activation"), [(False, "relu"), (True, "gelu")])
def test_torch_transformer(prenorm, activation, dtype):
    config = TransformerConfig(
        **SEQ2SEQ, prenorm=prenorm, activation=activation, final_norms=not prenorm
    )
    theirs, ours = TorchSeq2Seq(config), Transformer(config)
    randomize(theirs)
    state = from_torch(theirs.transformer.state_dict(), config)
    state["target_embedding.weight"] = theirs.embedding.weight
    ours.load_state_dict(state)
    kept = {name: tensor for name, tensor in state.items() if "embedding" not in name}
    back = to_torch(kept, config)
    assert back.keys() == theirs.transformer.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in theirs.transformer.state_dict().items())

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        grads = {name: parameter.grad for name, parameter in model.transformer.named_parameters()}
        return from_torch(grads, config) | {"target_embedding.weight": model.embedding.weight.grad}

    def call(model: nn.Module) -> list[Tensor]:
        narrow = dtype == "autocast" and next(model.parameters()).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            logits = model(SOURCE, TOKENS, source_lengths=SOURCE_LENGTHS, target_lengths=LENGTHS)
        return [logits[REAL]]

    held = torch.float32 if dtype == "autocast" else dtype
    assert_same(ours, theirs, call, call, gradients, held)


def test_torch_transformer_errors():
    config = TransformerConfig(**SEQ2SEQ)
    state = TorchSeq2Seq(config).transformer.state_dict()
    with pytest.raises(ValueError, match=r"from_torch: config must have .*final_norms=True"):
        from_torch(state, config)
    config = TransformerConfig(**SEQ2SEQ, final_norms=True)
    del state["decoder.norm.weight"]
    with pytest.raises(ValueError, match=r"must hold decoder\.norm\.weight \(1 are missing\)"):
        from_torch(state, config)


# --- Hugging Face ---------------------------------------------------------------------------------

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def make(kind: str):
    """A model of theirs, without dropout, of random weights."""
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=31, n_positions=16, n_embd=32, n_layer=3, n_head=4, n_inner=48,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "vit":
        config = transformers.ViTConfig(
            **SIZES, image_size=12, patch_size=4, num_channels=2, num_labels=5
        )
        model = transformers.ViTForImageClassification(config)
    else:
        config = transformers.BertConfig(**SIZES, vocab_size=31, max_position_embeddings=16)
        config.num_labels = 3 if kind == "BertForSequenceClassification" else 2
        model = getattr(transformers, kind)(config)
    model.set_attn_implementation("eager")
    randomize(model)
    return model.eval()


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def gradients_of(kind: str, ours: nn.Module, folder):
    """For assert_same(). Their names in memory vary with releases, those in a file do not."""
    safetensors = pytest.importorskip("safetensors.torch")
    family = huggingface._FAMILIES[kind]

    def gradients(model) -> dict[str, Tensor]:
        holder = copy.deepcopy(model)
        for held, parameter in zip(holder.parameters(), model.parameters(), strict=True):
            held.data = parameter.grad
        holder.save_pretrained(folder / "gradients")
        state = safetensors.load_file(folder / "gradients/model.safetensors")
        return read("gradients", family.table(ours.config), huggingface._normal(state, family))

    return gradients


BERT_KINDS = ["BertForPreTraining", "BertForMaskedLM", "BertForSequenceClassification", "BertModel"]


@pytest.mark.filterwarnings("ignore:load_hf. the checkpoint lacks")
@pytest.mark.parametrize("kind", ["gpt2", *BERT_KINDS, "vit"])
def test_round_trip(kind, tmp_path):
    """What we load and save again, theirs loads without a word, every tensor as it was."""
    theirs = make(kind)
    ours = load_hf(saved(theirs, tmp_path / "theirs"))
    save_hf(ours, tmp_path / "ours")
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for name in (*huggingface._ENCODER_FIELDS.values(), "n_inner", "n_positions", "num_labels"):
        assert getattr(again.config, name, None) == getattr(theirs.config, name, None), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpt2(dtype, tmp_path):
    theirs = make("gpt2")
    ours = load_hf(saved(theirs, tmp_path))
    assert isinstance(ours, GPT)
    assert_same(
        ours, theirs,
        lambda model: [model(TOKENS, LENGTHS)[REAL]],
        lambda model: [model(TOKENS, attention_mask=REAL).logits[REAL]],
        gradients_of("gpt2", ours, tmp_path), dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bert(dtype, tmp_path):
    theirs = make("BertForPreTraining")
    ours = load_hf(saved(theirs, tmp_path))
    assert isinstance(ours, BERT)
    segments = (TOKENS > 15).long()

    def call_ours(model: BERT) -> list[Tensor]:
        hidden = model(TOKENS, segments, LENGTHS)
        return [model.masked_lm(hidden)[REAL], model.classify(hidden)]

    def call_theirs(model) -> list[Tensor]:
        out = model(TOKENS, token_type_ids=segments, attention_mask=REAL)
        return [out.prediction_logits[REAL], out.seq_relationship_logits]

    gradients = gradients_of("bert", ours, tmp_path)
    assert_same(ours, theirs, call_ours, call_theirs, gradients, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vit(dtype, tmp_path):
    theirs = make("vit")
    ours = load_hf(saved(theirs, tmp_path))
    assert isinstance(ours, ViT)
    images = torch.randn(3, 2, 12, 12, generator=torch.Generator().manual_seed(2))

    def call_ours(model: nn.Module) -> list[Tensor]:
        return [model(images.to(next(model.parameters()).dtype))]

    def call_theirs(model) -> list[Tensor]:
        return [model(images.to(model.dtype)).logits]

    gradients = gradients_of("vit", ours, tmp_path)
    assert_same(ours, theirs, call_ours, call_theirs, gradients, dtype)


def test_hidden_states_are_theirs(tmp_path):
    theirs = make("gpt2")
    ours = load_hf(saved(theirs, tmp_path))
    with torch.no_grad():
        expected = theirs.double()(TOKENS, output_hidden_states=True).hidden_states
        logits, states = ours.double()(TOKENS, hidden_states=True)
    # Theirs begins with the embeddings, and norms the last.
    assert len(states) == len(expected) - 1 == 3
    for state, other in zip(states[:-1], expected[1:-1], strict=True):
        torch.testing.assert_close(state, other)
    assert torch.equal(logits, ours(TOKENS))


def test_a_checkpoint_without_heads(tmp_path):
    with pytest.warns(UserWarning, match="lacks head_linear.weight, .* random now"):
        model = load_hf(saved(make("BertModel"), tmp_path))
    assert 0 < model.head_linear.weight.std() < 0.1
    assert torch.equal(model.head_bias, torch.zeros(31))


def test_names_of_old_checkpoints(tmp_path):
    """As TensorFlow had them, and with what was once saved beside the parameters."""
    safetensors = pytest.importorskip("safetensors.torch")
    theirs = make("BertForPreTraining")
    folder = saved(theirs, tmp_path)
    state = safetensors.load_file(folder / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for now, then in old.items():
        state = {name.replace(now, then): tensor for name, tensor in state.items()}
    state["bert.embeddings.position_ids"] = torch.arange(16)[None]
    safetensors.save_file(state, folder / "model.safetensors")
    model = load_hf(folder)
    assert torch.equal(model.head_norm.weight, theirs.cls.predictions.transform.LayerNorm.weight)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "llama"}, "model_type must be one of gpt2, bert, vit; got 'llama'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True in config.json"),
        ({"resid_pdrop": 0.3}, "must be equal in config.json, or dropout be given"),
        ({"n_layer": 2}, "must hold nothing more; got transformer.h.2."),
        ({"n_layer": 4}, r"must hold transformer\.h\.3\.ln_1\.weight \(12 are missing\)"),
        ({"n_positions": 15}, r"position_embedding.weight must be \(15, 32\)"),
        ({"n_head": 5}, "d_model must be a multiple of heads; got 32 and 5"),
        ({"activation_function": "tanh"}, "activation must be one of .*; got 'tanh'"),
    ],
)
def test_errors(changed, message, tmp_path):
    folder = saved(make("gpt2"), tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ValueError, match=message):
        load_hf(folder)


def test_what_changes(tmp_path):
    folder = saved(make("gpt2"), tmp_path)
    assert load_hf(folder, dropout=0.25).config.dropout == 0.25


@pytest.mark.parametrize("change", [{"rotary": True}, {"share_layers": True}, {"prenorm": False}])
def test_what_theirs_cannot_have(change, tmp_path):
    config = GPTConfig(
        vocab_size=31, max_length=16, d_model=32, layers=2, heads=4, d_ff=48, **change
    )
    with pytest.raises(ValueError, match=f"save_hf: {next(iter(change))} must be"):
        save_hf(GPT(config), tmp_path / "new")
    assert not (tmp_path / "new").exists()
