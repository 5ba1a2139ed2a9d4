"""Training steps of other libraries' models, as they are and after fuse(), side by side.

    python -m fusedformer.benchmarks.third_party bert gpt2 [--layers 2] [--compile]

Random weights, the widths and the dropout of the published base models, 512 tokens. One step is
forward, the model's own loss and backward; both models take turns, round by round.
"""

import argparse
import contextlib
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fusedformer
from fusedformer.benchmarks.timing import clock_for, time_interleaved, whole

LENGTH = 512

Step = Callable[[], Any]
Made = tuple[torch.nn.Module, Callable[[torch.nn.Module], Tensor]]  # a model, and its loss


def _tokens(batch: int) -> Tensor:
    return torch.randint(5, 20000, (batch, LENGTH))


def _transformers(name: str, config: Any, **inputs: Tensor) -> Made:
    import transformers

    model = getattr(transformers, name)(config)
    return model, lambda m: m(**inputs).loss


def bert(layers: int, batch: int) -> Made:
    import transformers

    tokens = _tokens(batch)
    config = transformers.BertConfig(num_hidden_layers=layers)
    return _transformers("BertForMaskedLM", config, input_ids=tokens, labels=tokens)


def gpt2(layers: int, batch: int) -> Made:
    import transformers

    tokens = _tokens(batch)
    config = transformers.GPT2Config(n_layer=layers)
    return _transformers("GPT2LMHeadModel", config, input_ids=tokens, labels=tokens)


def vit(layers: int, batch: int) -> Made:
    """Images of 352 x 352: 485 tokens."""
    import transformers

    config = transformers.ViTConfig(num_hidden_layers=layers, image_size=352, num_labels=1000)
    images, labels = torch.randn(batch, 3, 352, 352), torch.randint(1000, (batch,))
    return _transformers("ViTForImageClassification", config, pixel_values=images, labels=labels)


def llama(layers: int, batch: int) -> Made:
    """The width of GPT-2, four heads of keys."""
    import transformers

    tokens = _tokens(batch)
    config = transformers.LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=12,
        num_key_value_heads=4,
    )  # fmt: skip
    return _transformers("LlamaForCausalLM", config, input_ids=tokens, labels=tokens)


def t5(layers: int, batch: int) -> Made:
    import transformers

    tokens = _tokens(batch)
    config = transformers.T5Config(
        d_model=768, d_kv=64, d_ff=3072, num_layers=layers, num_heads=12, decoder_start_token_id=0
    )
    return _transformers("T5ForConditionalGeneration", config, input_ids=tokens, labels=tokens)


def bart(layers: int, batch: int) -> Made:
    import transformers

    tokens = _tokens(batch)
    config = transformers.BartConfig(
        d_model=768, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=12,
        decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072,
    )  # fmt: skip
    return _transformers("BartForConditionalGeneration", config, input_ids=tokens, labels=tokens)


def whisper(layers: int, batch: int) -> Made:
    """The encoder."""
    import transformers

    config = transformers.WhisperConfig(
        d_model=512, encoder_layers=layers, encoder_attention_heads=8, encoder_ffn_dim=2048,
        decoder_layers=1, decoder_attention_heads=8, max_source_positions=LENGTH,
    )  # fmt: skip
    features = torch.randn(batch, 80, 2 * LENGTH)
    model = transformers.WhisperModel(config).get_encoder()
    return model, lambda m: m(features.to(m.conv1.weight.dtype)).last_hidden_state.square().mean()


def encoder(layers: int, batch: int) -> Made:
    """torch.nn.TransformerEncoder, as wide as BERT."""
    layer = torch.nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
    x = torch.randn(batch, LENGTH, 768)
    model = torch.nn.TransformerEncoder(layer, layers)
    return model, lambda m: m(x.to(m.layers[0].norm1.weight.dtype)).square().mean()


def transformer(layers: int, batch: int) -> Made:
    """torch.nn.Transformer, the base model of the paper."""
    model = torch.nn.Transformer(512, 8, layers, layers, 2048, batch_first=True)
    x, mask = torch.randn(batch, LENGTH, 512), model.generate_square_subsequent_mask(LENGTH)

    def loss(m: Any) -> Tensor:
        y = x.to(m.encoder.norm.weight.dtype)
        return m(y, y, tgt_mask=mask.to(y.dtype), tgt_is_causal=True).square().mean()

    return model, loss


def x_transformers(layers: int, batch: int) -> Made:
    """A decoder that calls torch's attention function, with dropout 0.1."""
    from x_transformers import Decoder, TransformerWrapper

    tokens = _tokens(batch)
    model = TransformerWrapper(
        num_tokens=20000, max_seq_len=LENGTH, emb_dropout=0.1,
        attn_layers=Decoder(
            dim=768, depth=layers, heads=12, attn_flash=True, attn_dropout=0.1, ff_dropout=0.1
        ),
    )  # fmt: skip
    return model, lambda m: torch.nn.functional.cross_entropy(
        m(tokens).flatten(0, 1).float(), tokens.flatten()
    )


MODELS: dict[str, Callable[[int, int], Made]] = {
    function.__name__: function
    for function in (
        bert, gpt2, vit, llama, t5, bart, whisper, encoder, transformer, x_transformers
    )
}  # fmt: skip


def step(model: torch.nn.Module, loss: Callable[[torch.nn.Module], Tensor], fused: bool) -> Step:
    """One training step without an optimizer's."""

    def run() -> None:
        with fusedformer.sdpa() if fused else contextlib.nullcontext():
            loss(model).backward()
        model.zero_grad(set_to_none=True)

    return run


def measure(name: str, args: argparse.Namespace) -> str:
    """A line of the table."""
    torch.manual_seed(0)
    original, loss = MODELS[name](args.layers, args.batch)
    original = original.to(getattr(torch, args.dtype)).train()
    fused = copy.deepcopy(original)
    report = fusedformer.fuse(fused)
    if args.report:
        print(report)
    models = {"original": original, "fused": fused}
    if args.compile:
        for model in models.values():
            model.compile()
    samples = {what: whole([step(m, loss, what == "fused")]) for what, m in models.items()}
    found = time_interleaved(
        samples, clock_for("cpu"), seconds=0, min_rounds=args.rounds, max_rounds=args.rounds,
        warmup=2,
    )  # fmt: skip
    for result in found.values():
        if "error" in result:
            raise result["error"]
    times = [found[what]["ms"] for what in ("original", "fused")]
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    before, after = map(statistics.median, times)
    mode = "compiled" if args.compile else "eager"
    return f"{name:15} {mode:9} {before:10.0f} ms {after:10.0f} ms {ratio:8.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", choices=[[], *MODELS], help="default: all")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--report", action="store_true", help="print what was fused, too")
    args = parser.parse_args()
    print(f"threads: {torch.get_num_threads()}; {args.layers} layers, batch {args.batch}, "
          f"{LENGTH} tokens, {args.dtype}; medians of {args.rounds} rounds")  # fmt: skip
    print(f"{'model':25} {'original':>13} {'fused':>13} {'ratio':>9}")
    for name in args.models or MODELS:
        try:
            line = measure(name, args)
        except ModuleNotFoundError as error:
            line = f"{name:15} left out: {error.name} is not installed"
        print(line, flush=True)


if __name__ == "__main__":
    main()
