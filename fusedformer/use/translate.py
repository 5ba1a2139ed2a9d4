"""``fusedformer translate``: sentences by an encoder-decoder Transformer."""

import argparse
import json

from fusedformer import use
from fusedformer.transformer.data import EOS, SOS, encode, pad
from fusedformer.transformer.generate import generate
from fusedformer.transformer.seq2seq import Transformer

_BATCH = 32  # sentences at once


def configure(parser: argparse.ArgumentParser) -> None:
    use.add_checkpoint(parser)
    use.add_texts(parser, "a sentence; of standard input each line is one")
    parser.add_argument("--beams", type=int, default=4, help="of beam search; 1 is greedy (4)")
    parser.add_argument(
        "--length-penalty", type=float, default=0.6, metavar="ALPHA",
        help="of beam search: above 0 longer translations win more often (0.6)",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="default: the source's tokens + 50"
    )


def run(args: argparse.Namespace) -> int:
    model, tokenizer, _ = use.load(args, Transformer)
    texts = use.texts(args)
    sources = encode(tokenizer, texts, eos=True)
    for number, source in enumerate(sources, start=1):
        use.check_room(len(source), model, f"text {number}")
    for start in range(0, len(texts), _BATCH):
        translations = translate(
            model, tokenizer, sources[start : start + _BATCH], args.beams, args.length_penalty,
            args.max_new_tokens,
        )  # fmt: skip
        for text, translation in zip(texts[start:], translations, strict=False):
            if args.json:
                record = {"source": text, "translation": translation}
                print(json.dumps(record, ensure_ascii=False), flush=True)
            else:
                print(translation, flush=True)
    return 0


def translate(
    model: Transformer,
    tokenizer,
    sources: list[list[int]],
    beams: int = 4,
    length_penalty: float = 0.6,
    max_new_tokens: "int | None" = None,
) -> list[str]:
    """Translations of a batch of sources, each token ids that end in <eos>."""
    tokens, lengths = pad(sources)
    device = next(model.parameters()).device
    if max_new_tokens is None:
        # As many as the paper allows (section 6.1), and as the model has positions for.
        max_new_tokens = min(tokens.shape[1] + 50, model.config.max_length)
    search = {"num_beams": beams, "length_penalty": length_penalty}
    written, written_lengths = generate(
        model,
        source=tokens.to(device),
        source_lengths=lengths.to(device),
        max_new_tokens=max_new_tokens,
        start_token=SOS,
        end_token=EOS,
        **(search if beams != 1 else {"temperature": 0}),
    )
    rows = zip(written.tolist(), written_lengths.tolist(), strict=True)
    return [tokenizer.decode(row[:length]).strip() for row, length in rows]
