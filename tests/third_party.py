"""Tiny models of other libraries, random weights, for the tests that put our kernels into them.

Each function returns the model, in evaluation mode, and the arguments of a call. Weights are large
enough for attention to be far from uniform, so that a wrong mask or scale shows.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

BATCH, LENGTH, VOCABULARY = 3, 21, 61


def _tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, LENGTH))


def padding(left: bool = False) -> Tensor:
    """(BATCH, LENGTH), 1 = a token: rows of LENGTH, 14 and 5 tokens."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, 14:] = mask[2, 5:] = 0
    return mask.flip(1) if left else mask


def _build(model: "torch.nn.Module") -> "torch.nn.Module":
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def gpt2(dropout: float = 0.0) -> "tuple[Any, dict[str, Tensor]]":
    hf = pytest.importorskip("transformers")
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return _build(hf.GPT2LMHeadModel(config)), {"input_ids": _tokens()}


def bert(dropout: float = 0.0) -> "tuple[Any, dict[str, Tensor]]":
    hf = pytest.importorskip("transformers")
    config = hf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return _build(hf.BertForMaskedLM(config)), {"input_ids": _tokens()}


def vit(dropout: float = 0.0) -> "tuple[Any, dict[str, Tensor]]":
    hf = pytest.importorskip("transformers")
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=16, patch_size=4, num_labels=5,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    model = _build(hf.ViTForImageClassification(config))
    return model, {"pixel_values": torch.randn(BATCH, 3, 16, 16)}


def llama(dropout: float = 0.0) -> "tuple[Any, dict[str, Tensor]]":
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
        attention_dropout=dropout, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return _build(hf.LlamaForCausalLM(config)), {"input_ids": _tokens()}


def mistral(dropout: float = 0.0) -> "tuple[Any, dict[str, Tensor]]":
    """A sliding window of 6 keys."""
    hf = pytest.importorskip("transformers")
    config = hf.MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, sliding_window=6,
        attention_dropout=dropout, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return _build(hf.MistralForCausalLM(config)), {"input_ids": _tokens()}


def t5(dropout: float = 0.0) -> "tuple[Any, dict[str, Tensor]]":
    hf = pytest.importorskip("transformers")
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        dropout_rate=dropout, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = _build(hf.T5ForConditionalGeneration(config))
    return model, {"input_ids": _tokens(), "decoder_input_ids": _tokens()[:, :13]}


def bart(dropout: float = 0.0) -> "tuple[Any, dict[str, Tensor]]":
    hf = pytest.importorskip("transformers")
    config = hf.BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_position_embeddings=64, dropout=dropout, attention_dropout=dropout,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=2,
        forced_eos_token_id=None,
    )  # fmt: skip
    model = _build(hf.BartForConditionalGeneration(config))
    return model, {"input_ids": _tokens(), "decoder_input_ids": _tokens()[:, :13]}


def whisper(dropout: float = 0.0) -> "tuple[Any, dict[str, Tensor]]":
    """The encoder alone."""
    hf = pytest.importorskip("transformers")
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, encoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_layers=1, decoder_attention_heads=4,
        num_mel_bins=8, max_source_positions=LENGTH,
        dropout=dropout, attention_dropout=dropout,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    model = _build(hf.WhisperModel(config).get_encoder())
    return model, {"input_features": torch.randn(BATCH, 8, 2 * LENGTH)}


def torch_transformer(dropout: float = 0.0) -> "tuple[Any, dict[str, Tensor]]":
    """torch.nn.Transformer, padded, its decoder causal."""
    model = torch.nn.Transformer(32, 4, 2, 2, 48, dropout, batch_first=True, activation="gelu")
    hidden = padding() == 0
    return _build(model), {
        "src": torch.randn(BATCH, LENGTH, 32), "tgt": torch.randn(BATCH, 13, 32),
        "tgt_mask": torch.ones(13, 13).triu(1).bool(), "tgt_is_causal": True,
        "src_key_padding_mask": hidden, "memory_key_padding_mask": hidden,
    }  # fmt: skip


def x_transformers(dropout: float = 0.0) -> "tuple[Any, dict[str, Tensor]]":
    """A decoder that calls torch's attention function."""
    library = pytest.importorskip("x_transformers")
    model = library.TransformerWrapper(
        num_tokens=VOCABULARY, max_seq_len=64, emb_dropout=dropout,
        attn_layers=library.Decoder(
            dim=32, depth=2, heads=4, attn_dim_head=8, attn_flash=True, attn_dropout=dropout,
            ff_dropout=dropout,
        ),
    )  # fmt: skip
    return _build(model), {"x": _tokens()}


def _timm(name: str, **options: Any) -> "tuple[Any, dict[str, Tensor]]":
    timm = pytest.importorskip("timm")
    timm.layers.set_fused_attn(True, experimental=True)  # Swin calls torch's function only then
    model = timm.create_model(name, num_classes=5, **options)
    size = options["img_size"]
    return _build(model), {"x": torch.randn(BATCH, 3, size, size)}


def timm_vit(dropout: float = 0.0) -> "tuple[Any, dict[str, Tensor]]":
    return _timm(
        "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3,
        proj_drop_rate=dropout, attn_drop_rate=dropout,
    )  # fmt: skip


def timm_deit(dropout: float = 0.0) -> "tuple[Any, dict[str, Tensor]]":
    return _timm(
        "deit_tiny_distilled_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3,
        proj_drop_rate=dropout, attn_drop_rate=dropout,
    )  # fmt: skip


def timm_swin(dropout: float = 0.0) -> "tuple[Any, dict[str, Tensor]]":
    return _timm(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(2, 2), embed_dim=24, num_heads=(2, 4),
        proj_drop_rate=dropout, attn_drop_rate=dropout,
    )  # fmt: skip


Make = Callable[..., "tuple[Any, dict[str, Any]]"]
HF_MODELS: dict[str, Make] = {
    function.__name__: function for function in (gpt2, bert, vit, llama, mistral, t5, bart, whisper)
}
# Whose attention is torch's function, which fusedformer.sdpa() switches.
SDPA_MODELS: dict[str, Make] = {
    function.__name__: function for function in (x_transformers, timm_vit, timm_deit, timm_swin)
}
MODELS: dict[str, Make] = {**HF_MODELS, "torch_transformer": torch_transformer, **SDPA_MODELS}


def cast(inputs: "dict[str, Any]", dtype: torch.dtype) -> "dict[str, Any]":
    """The inputs with those of floating point in a dtype."""
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def output(model: "torch.nn.Module", inputs: "dict[str, Any]") -> Tensor:
    """The logits, or what a model without a head gives."""
    result = model(**inputs)
    if isinstance(result, Tensor):
        return result
    return result.logits if "logits" in result else result.last_hidden_state


def in_several_draws(run: "Callable[[], dict[str, list[Tensor]]]") -> "dict[str, list[Tensor]]":
    """What a test compares, of four draws of weights and inputs, end to end.

    A largest error is a matter of luck: of one small model, that of two implementations as good as
    each other may well differ by more than a factor of two.
    """
    found: dict[str, list[list[Tensor]]] = {}
    for seed in range(4):
        torch.manual_seed(seed)
        for label, tensors in run().items():
            found.setdefault(label, []).append([tensor.detach().flatten() for tensor in tensors])
    return {
        label: [torch.cat(draws) for draws in zip(*lists, strict=True)]
        for label, lists in found.items()
    }


def gradients(model: "torch.nn.Module", logits: Tensor) -> Tensor:
    """Of all parameters, as one vector: those of a sum of the logits with random weights."""
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    loss = (logits * weight.to(logits.dtype)).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])
