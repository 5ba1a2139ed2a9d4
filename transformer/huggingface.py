"""Checkpoints of Hugging Face's GPT-2, BERT and ViT: local folders, loaded and saved."""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedformer.kernels.checks import shape
from fusedformer.transformer.bert import BERT, BERTConfig
from fusedformer.transformer.config import ModelConfig
from fusedformer.transformer.convert import Entry, norm_name, packed, pair, read, write
from fusedformer.transformer.gpt import GPT, GPTConfig
from fusedformer.transformer.vit import ViT, ViTConfig

# --- Tables ---------------------------------------------------------------------------------------


def _gpt2_table(config: GPTConfig) -> Iterator[Entry]:
    yield Entry("token_embedding.weight", ("transformer.wte.weight",))
    yield Entry("position_embedding.weight", ("transformer.wpe.weight",))
    for index in range(config.layers):
        ours, theirs = f"stack.layers.{index}", f"transformer.h.{index}"
        yield from pair(norm_name("stack", index, 1, 2, True), f"{theirs}.ln_1")
        yield from packed(f"{ours}.self_attention", f"{theirs}.attn.c_attn", transposed=True)
        for name, other in (
            ("self_attention.out_proj", "attn.c_proj"),
            ("feed_forward.linear1", "mlp.c_fc"),
            ("feed_forward.linear2", "mlp.c_proj"),
        ):
            yield from pair(f"{ours}.{name}", f"{theirs}.{other}", transposed=True)
        yield from pair(norm_name("stack", index, 2, 2, True), f"{theirs}.ln_2")
    yield from pair(norm_name("stack", config.layers, 1, 2, True), "transformer.ln_f")


def _encoder_table(config: ModelConfig, theirs: str, inner: str) -> Iterator[Entry]:
    """The linear layers that BERT and ViT name alike but for `inner`."""
    for index in range(config.layers):
        mine, other = f"encoder.layers.{index}", f"{theirs}.layer.{index}"
        projections = (f"{other}.attention.{inner}.{name}" for name in ("query", "key", "value"))
        yield from packed(f"{mine}.self_attention", *projections)
        yield from pair(f"{mine}.self_attention.out_proj", f"{other}.attention.output.dense")
        yield from pair(f"{mine}.feed_forward.linear1", f"{other}.intermediate.dense")
        yield from pair(f"{mine}.feed_forward.linear2", f"{other}.output.dense")


def _bert_table(config: BERTConfig) -> Iterator[Entry]:
    embeddings = "bert.embeddings"
    yield Entry("token_embedding.weight", (f"{embeddings}.word_embeddings.weight",))
    yield Entry("position_embedding.weight", (f"{embeddings}.position_embeddings.weight",))
    yield Entry("segment_embedding.weight", (f"{embeddings}.token_type_embeddings.weight",))
    yield from pair("embedding_norm", f"{embeddings}.LayerNorm")
    yield from _encoder_table(config, "bert.encoder", "self")
    for index in range(config.layers):
        ours, theirs = f"encoder.layers.{index}", f"bert.encoder.layer.{index}"
        yield from pair(f"{ours}.norm1", f"{theirs}.attention.output.LayerNorm")
        yield from pair(f"{ours}.norm2", f"{theirs}.output.LayerNorm")
    yield from pair("pooler", "bert.pooler.dense")
    yield from pair("head_linear", "cls.predictions.transform.dense")
    yield from pair("head_norm", "cls.predictions.transform.LayerNorm")
    yield Entry("head_bias", ("cls.predictions.bias",))
    yield from pair("classifier", "classifier")


def _vit_table(config: ViTConfig) -> Iterator[Entry]:
    width, patch, channels = config.d_model, config.patch_size, config.channels
    tokens = (config.image_size // patch) ** 2 + 1
    yield Entry("class_token", ("vit.embeddings.cls_token",))
    yield Entry(
        "position_embedding", ("vit.embeddings.position_embeddings",),
        shapes=((tokens, width), (1, tokens, width)),
    )  # fmt: skip
    weight, bias = pair("patch_embedding", "vit.embeddings.patch_embeddings.projection")
    shapes = ((width, channels * patch**2), (width, channels, patch, patch))
    yield Entry(weight.ours, weight.theirs, shapes=shapes)
    yield bias
    yield from _encoder_table(config, "vit.encoder", "attention")
    for index in range(config.layers):
        theirs = f"vit.encoder.layer.{index}"
        yield from pair(norm_name("encoder", index, 1, 2, True), f"{theirs}.layernorm_before")
        yield from pair(norm_name("encoder", index, 2, 2, True), f"{theirs}.layernorm_after")
    yield from pair(norm_name("encoder", config.layers, 1, 2, True), "vit.layernorm")
    yield from pair("classifier", "classifier")


# --- Configurations -------------------------------------------------------------------------------

# Our name of an activation -> theirs, the first of which is written.
_ACTIVATIONS = {
    "gelu": ("gelu",),
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh"),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
}


@dataclass(frozen=True)
class Family:
    """What is to be known of one of their model types.

    Attributes:
        fields: ours -> theirs.
        dropouts: theirs, for which ours has one number.
        fixed: theirs -> the only value that ours can be.
        prefix: of names, which a checkpoint of the bare model, without a head, does not have.
        heads: prefixes of our tensors that a checkpoint may lack.
        unread: what their names contain that hold nothing of their own.
        architecture: theirs, as which ours is saved.
    """

    model: Callable[[Any], Any]
    config: type[ModelConfig]
    table: Callable[[Any], Iterator[Entry]]
    fields: dict[str, str]
    dropouts: tuple[str, ...]
    fixed: dict[str, Any]
    prefix: str
    heads: tuple[str, ...]
    unread: tuple[str, ...]
    architecture: str


_ENCODER_FIELDS = {
    "d_model": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "activation": "hidden_act",
    "eps": "layer_norm_eps",
}
_ENCODER_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")

_FAMILIES = {
    "gpt2": Family(
        GPT,
        GPTConfig,
        _gpt2_table,
        fields={
            "vocab_size": "vocab_size",
            "max_length": "n_positions",
            "d_model": "n_embd",
            "layers": "n_layer",
            "heads": "n_head",
            "d_ff": "n_inner",
            "activation": "activation_function",
            "eps": "layer_norm_epsilon",
        },
        dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        fixed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        },
        prefix="transformer.",
        heads=(),
        unread=(".attn.bias", ".attn.masked_bias", "lm_head."),
        architecture="GPT2LMHeadModel",
    ),
    "bert": Family(
        BERT,
        BERTConfig,
        _bert_table,
        fields=_ENCODER_FIELDS
        | {
            "vocab_size": "vocab_size",
            "max_length": "max_position_embeddings",
            "segments": "type_vocab_size",
        },
        dropouts=_ENCODER_DROPOUTS,
        fixed={
            "is_decoder": False,
            "add_cross_attention": False,
            "position_embedding_type": "absolute",
            "tie_word_embeddings": True,
        },
        prefix="bert.",
        heads=("head_", "pooler.", "classifier."),
        # The second only beside a classifier.
        unread=("position_ids", "cls.seq_relationship.", "cls.predictions.decoder."),
        architecture="BertForPreTraining",
    ),
    "vit": Family(
        ViT,
        ViTConfig,
        _vit_table,
        fields=_ENCODER_FIELDS
        | {
            "image_size": "image_size",
            "patch_size": "patch_size",
            "channels": "num_channels",
        },
        dropouts=_ENCODER_DROPOUTS,
        fixed={"qkv_bias": True},
        prefix="vit.",
        heads=("classifier.",),
        unread=("pooler.",),
        architecture="ViTForImageClassification",
    ),
}


def _family(model_type: str) -> Family:
    if model_type not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise ValueError(f"load_hf: model_type must be one of {known}; got {model_type!r}")
    return _FAMILIES[model_type]


def _config(family: Family, theirs: dict[str, Any], changes: dict[str, Any]) -> Any:
    """Ours, of what a config.json says."""
    for name, only in family.fixed.items():
        if theirs.get(name, only) != only:
            raise ValueError(f"load_hf: {name} must be {only} in config.json; got {theirs[name]}")
    fields: dict[str, Any] = {
        ours: theirs[name] for ours, name in family.fields.items() if theirs.get(name) is not None
    }
    if family.config is GPTConfig:
        fields.setdefault("d_ff", 4 * fields["d_model"])
    known = {name: ours for ours, names in _ACTIVATIONS.items() for name in names}
    fields["activation"] = known.get(fields["activation"], fields["activation"])
    rates = {theirs[name] for name in family.dropouts if name in theirs}
    if len(rates) > 1 and "dropout" not in changes:
        raise ValueError(
            f"load_hf: {', '.join(family.dropouts)} must be equal in config.json, or dropout be "
            f"given, one for all; got {sorted(rates)}"
        )
    if len(rates) == 1:
        fields["dropout"] = rates.pop()
    return family.config(**(fields | changes))


# --- Loading and saving ---------------------------------------------------------------------------


def _normal(state: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The state with the names that its model would give it with all its heads on."""
    # Names of norms in checkpoints that came from TensorFlow.
    ends = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    for old, new in ends.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    if not any(name.startswith(family.prefix) for name in state):
        state = {family.prefix + name: tensor for name, tensor in state.items()}
    if "classifier.weight" not in state:
        old = "cls.seq_relationship."
        state = {name.replace(old, "classifier."): tensor for name, tensor in state.items()}
    return state


def load_hf(folder: "str | Path", **changes: Any) -> "GPT | BERT | ViT":
    """The model of a Hugging Face checkpoint, float32, in evaluation mode.

    Args:
        folder: with config.json and model.safetensors, of GPT-2, BERT or ViT, with or without
            heads. A head that it lacks is random, and a warning says so.
        changes: fields of our configuration, such as dropout=0.0.

    Raises:
        ValueError: it is of another kind, or holds what our model cannot.
        FileNotFoundError: there is no such file.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    theirs = json.loads((folder / "config.json").read_text())
    family = _family(theirs.get("model_type", ""))
    state = _normal(load_file(folder / "model.safetensors"), family)
    if "classifier.weight" in state:
        changes = {"classes": state["classifier.weight"].shape[0]} | changes
    config = _config(family, theirs, changes)

    table = list(family.table(config))
    placed = {name for entry in table for name in entry.theirs}
    for name in state.keys() - placed:
        if not any(part in name for part in family.unread):
            raise ValueError(f"load_hf: the checkpoint must hold nothing more; got {name}")
    absent = [e for e in table if e.ours.startswith(family.heads) and e.theirs[0] not in state]
    if absent:
        names = ", ".join(entry.ours for entry in absent)
        warnings.warn(f"load_hf: the checkpoint lacks {names}, random now", stacklevel=2)
    found = read("load_hf", (entry for entry in table if entry not in absent), state)

    with torch.device("meta"):
        model = family.model(config)
    for name, parameter in model.named_parameters():
        if name in found and found[name].shape != parameter.shape:
            raise ValueError(
                f"load_hf: {name} must be {shape(parameter)}, as config.json says; "
                f"got {shape(found[name])}"
            )
    model.to_empty(device="cpu")
    if absent:
        model.init_weights()
    model.load_state_dict(found, strict=not absent)
    return model.eval()


def save_hf(model: "GPT | BERT | ViT", folder: "str | Path") -> None:
    """Saves a checkpoint that Hugging Face's classes load; see load_hf().

    BERT's classifier is saved for BertForSequenceClassification, and where it has two classes for
    BertForPreTraining, too.

    Raises:
        ValueError: the model has what theirs cannot have, such as rotary positions.
    """
    from safetensors.torch import save_file

    config = model.config
    model_type, family = next(
        (name, family) for name, family in _FAMILIES.items() if isinstance(config, family.config)
    )
    for field in ("prenorm", "share_layers", "ff_dropout", "rotary"):
        default = getattr(family.config, field, None)
        if getattr(config, field, None) != default:
            raise ValueError(
                f"save_hf: {field} must be {default}, as in {family.architecture}; "
                f"got {getattr(config, field)}"
            )
    theirs = {name: getattr(config, ours) for ours, name in family.fields.items()}
    theirs |= dict.fromkeys(family.dropouts, config.dropout) | family.fixed
    theirs[family.fields["activation"]] = _ACTIVATIONS[config.activation][0]
    state = write(family.table(config), model.state_dict())
    if not isinstance(config, GPTConfig):
        theirs["id2label"] = {str(index): f"LABEL_{index}" for index in range(config.classes)}
        theirs["label2id"] = {name: int(index) for index, name in theirs["id2label"].items()}
        if isinstance(config, BERTConfig) and config.classes == 2:
            for kind in ("weight", "bias"):
                state[f"cls.seq_relationship.{kind}"] = state[f"classifier.{kind}"].clone()
    theirs |= {"model_type": model_type, "architectures": [family.architecture]}
    theirs["dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
